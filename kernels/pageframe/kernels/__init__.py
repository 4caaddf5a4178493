"""Kernels over paged KV memory, each with a plain reference of the same name."""
