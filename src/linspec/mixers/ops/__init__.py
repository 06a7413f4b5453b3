"""Functions on tensors that mixers are made of: exact, summed and decayed parts, delta rule, convolution."""
