"""Capture: who reads each weight, and a graph of it that computes what the model computes."""
