"""CPU kernels in C++, compiled for the machine's instruction set and called through ctypes."""
