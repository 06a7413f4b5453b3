"""Without a CUDA device Triton's kernels run in its interpreter, which is decided before they load."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
