"""What happened in a simulation, in order, as one hash and, if wanted, as lines."""

import hashlib


class EventLog:
    """Hashes events; two runs of one seed have the same hash or something was not determined.

    Args:
        keeps_lines: Whether to keep the lines, for a person.

    Attributes:
        lines: The lines, if kept.
        num_events: How many.
    """

    def __init__(self, *, keeps_lines: bool = False) -> None:
        self._hash = hashlib.blake2b(digest_size=8)
        self.keeps_lines = keeps_lines
        self.lines: list[str] = []
        self.num_events = 0

    def note(self, now_s: float, line: str, data: bytes = b"") -> None:
        """Add an event, with the bytes of the message that it is about."""
        self.num_events += 1
        self._hash.update(f"{now_s!r} {line}\n".encode())
        self._hash.update(data)
        if self.keeps_lines:
            self.lines.append(f"{now_s:12.6f} {line}")

    @property
    def digest(self) -> str:
        """The hash so far, 16 hexadecimal digits."""
        return self._hash.hexdigest()
