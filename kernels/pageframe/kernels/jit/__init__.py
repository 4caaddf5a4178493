"""Triton kernels: one problem per kernel, no allocation, no checks; ``ops`` does both."""
