"""What the engine's tests need of torch before the first of them runs."""

import torch

# Where its CUDA build meets no GPU, torch makes eight up to trace shapes for, and the next backward pass starts a
# thread for each. A process with such threads must not be forked, which is how these tests start ranks.
if not torch.cuda.is_available():
    torch._C._ensureCUDADeviceGuardSet = lambda: None
