"""The operations for CPUs, in C++: `build` compiles `ops/csrc`, `kernels` calls what it made."""
