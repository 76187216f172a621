"""``python -m diffq_fx``: the ``diffq-fx`` command line."""

from diffq_fx_command import main

if __name__ == "__main__":
    main()
