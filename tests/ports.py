"""Ports that stay free until somebody listens on them."""

import random
import socket

# Below what systems give to those who ask for any port, so that nobody comes by one meanwhile.
_FIRST, _END = 12_000, 32_000


def free_ports(count: int = 1) -> int:
    """The first of several ports of 127.0.0.1 in a row that nobody has.

    Tests that run at the same time begin to look at different places.
    """
    for _ in range(_END - _FIRST):
        # Not the generator that tests seed: it would give two of them the same ports.
        first = random.SystemRandom().randrange(_FIRST, _END - count)
        sockets = [socket.socket() for _ in range(count)]
        try:
            for number, one in enumerate(sockets):
                one.bind(("127.0.0.1", first + number))
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
        return first
    raise AssertionError("no ports are free")
