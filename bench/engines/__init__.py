"""Whole engines side by side on one machine, the same requests, in turns."""
