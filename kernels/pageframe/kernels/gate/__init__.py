"""Compiles every kernel that serves, for every chip, and judges the machine code: needs no GPU."""
