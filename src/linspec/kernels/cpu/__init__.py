"""linspec's own CPU kernels: a small C library that ctypes loads, and the layers made from it."""
