"""The pageframe command."""
