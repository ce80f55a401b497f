"""FP8 matrix products on a GPU: the functions of `ds_fp8.ops.products`, in Triton."""
