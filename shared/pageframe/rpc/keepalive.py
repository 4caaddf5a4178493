"""Noticing that a peer has vanished: its machine lost power, or a cable was cut.

    silence ──── a third of the bound ────▶ ping ──── the rest of it ────▶ the connection is lost

A process that dies closes its connections; a machine that is gone closes nothing, and TCP by itself
finds out after minutes. HTTP/2 has pings for that, and gRPC answers them without Python: neither a
long step nor a process that holds the interpreter lock is taken for a loss. A stopped process is.

gRPC has two bounds for the answer, ``keepalive_timeout`` and ``ping_timeout``, and looks at the
second only, which is a minute unless set (grpcio 1.85). Both are set here.

Pings are for the channels between services, which are few and always in use. Callers from outside
are not pinged: a phone that sleeps should stay connected.
"""

from dataclasses import dataclass
from typing import Final

NOTICE_MS_MIN: Final = 1000
"""Least bound that may be asked for: a busy machine may take so long to do anything."""

_SILENT_PART: Final = 3
# Less than the silence under the least bound: whoever keeps to a bound pings no more often. A
# server ends connections that ping more often than it allows (GOAWAY, too_many_pings).
_PING_INTERVAL_MS_MIN: Final = NOTICE_MS_MIN // _SILENT_PART // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Keepalive:
    """How soon a peer that has vanished is noticed.

    Attributes:
        notice_ms: Milliseconds from its last sign of life until it is taken to be lost, at most.
    """

    notice_ms: int = 15_000

    def __post_init__(self) -> None:
        assert self.notice_ms >= NOTICE_MS_MIN, f"{self.notice_ms} ms are too few"

    def options(self) -> list[tuple[str, int]]:
        """Options of a channel, and of a server, which looks after its peers likewise."""
        silence_ms = self.notice_ms // _SILENT_PART
        answer_ms = self.notice_ms - silence_ms
        return [
            ("grpc.keepalive_time_ms", silence_ms),
            ("grpc.keepalive_timeout_ms", answer_ms),
            ("grpc.http2.ping_timeout_ms", answer_ms),
            # Without a call in progress nobody waits for the peer.
            ("grpc.keepalive_permit_without_calls", 0),
            ("grpc.http2.min_ping_interval_without_data_ms", _PING_INTERVAL_MS_MIN),
        ]
