"""Optimizer states in host memory: what they take, how they come to be there, and moves between phases."""
