"""``python -m diffq_fx``: the ``diffq-fx`` command line."""

from diffq_fx.cli import main

if __name__ == "__main__":
    main()
