"""Plain loops in double precision: slow, obvious, and what every operation is compared with."""
