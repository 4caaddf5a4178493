"""Checked public entry points: they validate, keep scratch and choose a way by device."""
