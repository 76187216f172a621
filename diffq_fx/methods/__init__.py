"""Methods: what happens to a weight in training, how it is rounded, how it is stored; one file each."""
