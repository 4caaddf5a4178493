"""Policies: who waits where, who comes in, who gives way, and how a victim comes back."""
