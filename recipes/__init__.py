"""The papers' experiments, one file each over one shared loop (:mod:`recipes.common`): ``python -m recipes.cifar --help``."""
