"""Checkpoints: written, verified, read at any world size, converted and exported."""
