"""The typed client of a gateway."""
