"""Many streams at once through one gateway, for minutes: errors, memory and processor time."""
