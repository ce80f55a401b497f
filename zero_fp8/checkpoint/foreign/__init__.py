"""Checkpoints of stock DeepSpeed, and universal ones."""
