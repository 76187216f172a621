"""Accuracy at an exact size: every system on the same real task, from the same float model, with the same number of steps.

``python -m benchmarks.frontier --help`` in the root of the repository says how to run it.
"""
