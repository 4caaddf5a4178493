"""A cable between two processes that a test can cut."""

import contextlib
import socket
import threading
import time
from typing import Self

_CHUNK_BYTES = 1 << 16


class Relay:
    """Forwards TCP connections to ``127.0.0.1:port`` until it vanishes. A context manager.

    A relay that has vanished closes nothing and says nothing, as a machine without power: who has a
    connection keeps it, who makes one gets it, and no byte comes through. When it is back only
    new connections do.

    Args:
        port: Where to forward to.
        delay_s: How long everything is under way, in each direction.

    Attributes:
        num_forwarded: Pieces that came through.
        num_connections: How often somebody has connected.
    """

    def __init__(self, port: int, *, delay_s: float = 0.0) -> None:
        self.num_forwarded = 0
        self.num_connections = 0
        self._delay_s = delay_s
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._progress = threading.Condition()
        self._ends: list[socket.socket] = []
        self._is_there = True
        self._cut = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def vanish(self) -> None:
        """Forward nothing any more."""
        with self._lock:
            self._is_there = False
            self._cut.set()
            self._cut = threading.Event()

    def come_back(self) -> None:
        """Forward what is connected from now on."""
        with self._lock:
            self._is_there = True

    def wait_forwarded(self, num_pieces: int, timeout_s: float) -> None:
        """Wait until so many pieces have come through in all."""
        with self._progress:
            is_done = self._progress.wait_for(
                lambda: self.num_forwarded >= num_pieces, timeout=timeout_s
            )
        assert is_done, f"{self.num_forwarded} of {num_pieces} pieces within {timeout_s:g} s"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            ends = [self._listener, *self._ends]
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self.num_connections += 1
                self._ends.append(caller)
                cut = self._cut if self._is_there else None
            # One that came while nobody was there is never forwarded, nor closed.
            if cut is not None:
                self._connect(caller, cut)

    def _connect(self, caller: socket.socket, cut: threading.Event) -> None:
        try:
            called = socket.create_connection(self._target)
        except OSError:
            caller.close()
            return
        with self._lock:
            self._ends.append(called)
        for source, sink in ((caller, called), (called, caller)):
            threading.Thread(target=self._pump, args=(source, sink, cut), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, cut: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK_BYTES):
                if cut.is_set():
                    return
                time.sleep(self._delay_s)
                sink.sendall(data)
                with self._progress:
                    self.num_forwarded += 1
                    self._progress.notify_all()
            if not cut.is_set():
                sink.shutdown(socket.SHUT_WR)
