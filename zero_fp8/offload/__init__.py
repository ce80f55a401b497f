"""Optimizer states in host memory: their size, their allocation, and moves between phases."""
