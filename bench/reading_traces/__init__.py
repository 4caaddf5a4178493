"""Five stalls, provoked on purpose and drawn: what `docs/reading-traces.md` shows."""
