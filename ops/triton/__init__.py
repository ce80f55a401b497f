"""The operations for NVIDIA GPUs, in Triton: a module has the name of its reference in `ds_fp8.ops`."""
