"""Numbers only: formats, blocks, the gradient sum and the Adam sweep. No config, no rank.

Each module holds the contract of an operation and its reference in plain PyTorch; a kernel
for a device lives next door under the same name and is measured against the reference.
"""
