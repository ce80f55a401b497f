"""The arguments of the C++ kernels, as csrc/ declares them."""

from ctypes import Structure, c_float, c_int32, c_int64, c_uint32, c_void_p


class CBlocks(Structure):
    """`Blocks` of csrc/blocks.h."""

    _fields_ = [("codes", c_void_p), ("scales", c_void_p), ("format", c_int64)]


class CValues(Structure):
    """`Values` of csrc/blocks.h."""

    _fields_ = [("data", c_void_p), ("dtype", c_int64)]


class CScalars(Structure):
    """`Scalars` of csrc/adam.h."""

    _fields_ = [
        *((name, c_float) for name in ("beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "root_beta2")),
        *((name, c_float) for name in ("quotient_beta", "step_size", "root_correction", "eps", "decay")),
        ("clamp", c_float),
        ("decoupled", c_int32),
    ]


class CSegment(Structure):
    """`Segment` of csrc/adam.h."""

    _fields_ = [(name, c_int64) for name in ("first_row", "last_row", "first_element", "parameter")]


class CSweep(Structure):
    """`Sweep` of csrc/adam.h."""

    _fields_ = [
        *((name, CBlocks) for name in ("gradient", "master", "exp_avg", "exp_avg_sq")),
        ("gradient_scales", c_void_p),
        ("weights", CValues),
        ("segments", c_void_p),
        ("segment_count", c_int64),
        ("counts", c_void_p),
        ("control", c_void_p),
        ("exp_avg_sq_stream", c_uint32),
        ("master_stream", c_uint32),
        ("multiplier", c_uint32),
        ("odd", c_uint32),
        ("block_size", c_int32),
        ("stochastic", c_int32),
        ("stores_sqrt", c_int32),
        ("scalars", CScalars),
        ("factors", c_float * 4),  # for the kernel's own use
    ]


class CRun(Structure):
    """`Run` of csrc/weights.h."""

    _fields_ = [(name, c_int64) for name in ("first", "count", "columns")]
