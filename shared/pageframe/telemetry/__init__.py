"""Records into shared memory, spans out of a process beside the service, logs."""
