"""Builders and doubles for tests; never imported by services."""
