"""Whether launches run now, or are captured in a CUDA graph, which runs them whenever it is replayed."""

import torch
from torch import Tensor


def captured(values: Tensor) -> bool:
    """Whether what is launched now for values goes into a CUDA graph."""
    return values.is_cuda and torch.cuda.is_current_stream_capturing()
