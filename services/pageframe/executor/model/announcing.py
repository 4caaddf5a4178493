"""Telling whoever waits for a model how far it is."""

from collections.abc import Callable

from pageframe.executor.model.weights import Progress

Announce = Callable[[str, float | None], None]
"""Told what is being done, and which part of it, in [0, 1], is finished where that is known."""


def announce_nothing(message: str, fraction: float | None) -> None:
    """Nobody watches."""


def in_percent(announce: Announce) -> Progress:
    """Bytes of weights to fractions, one message for each whole percent."""
    told = -1

    def progress(num_bytes: int, num_bytes_total: int) -> None:
        nonlocal told
        percent = min(100, 100 * num_bytes // max(1, num_bytes_total))
        if percent > told:
            told = percent
            announce("loading weights", percent / 100)

    return progress
