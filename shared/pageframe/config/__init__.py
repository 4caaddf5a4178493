"""Settings and the facts of the machine they are checked against; shared by all processes."""
