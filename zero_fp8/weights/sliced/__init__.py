"""Weights under ZeRO 3: slices of every parameter, and how the ranks gather them."""
