"""Grammars of outputs in the hands of llguidance, the same for all services."""
