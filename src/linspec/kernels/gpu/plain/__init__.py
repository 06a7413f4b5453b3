"""The kernels of `kernels/gpu/triton` as functions of torch: what they are proved against, in any dtype."""
