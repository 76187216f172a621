"""Passes: small rewrites of one fx graph; annotate first, then act on annotations alone."""
