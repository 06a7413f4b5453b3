"""Kernels in Triton for what a decode step reads: see docs/gpu.md. Importing a kernel needs triton.

`available.why_not(device)` says whether they can run; `kernels/gpu/plain` has the same functions in torch.
"""
