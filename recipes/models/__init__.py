"""The papers' architectures."""
