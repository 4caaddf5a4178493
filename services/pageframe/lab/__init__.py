"""The whole system in one process: benchmarks and experiments."""
