"""Measurements: what the product does, how much it costs, and how that compares."""
