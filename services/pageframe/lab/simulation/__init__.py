"""A seeded simulation of the whole system: one process, one thread, virtual time."""
