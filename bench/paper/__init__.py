"""The memory tables of the PagedAttention paper, from the real scheduler and memory code."""
