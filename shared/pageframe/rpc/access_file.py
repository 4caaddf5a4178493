"""The access file of a running service: looked at now and then, and read again when it changed.

A new file that cannot be read changes nothing: what the last good one said holds on, and one line
of the log says what is wrong. So a slip of the pen locks nobody out and lets nobody in.
"""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import structlog

from pageframe.core.errors import PageframeError
from pageframe.rpc.access import Access, read_access
from pageframe.rpc.auth import Authenticator

_log = structlog.get_logger(__name__)

LOOK_INTERVAL_S = 2.0
"""How often a service looks."""

_Signature = tuple[int, int, int]


class AccessFile:
    """One access file, and what it says now.

    Args:
        path: Where it is; None for no file, which says nothing and lets everybody in.

    Attributes:
        access: What it says, or what it said last when it was good.

    Raises:
        InvalidRequestError: as ``read_access``.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._on_change: list[Callable[[Access], None]] = []
        # Before it is read: a change in between is seen at the next look.
        self._seen = self._signature()
        self.access = Access() if path is None else read_access(path)

    def on_change(self, tell: Callable[[Access], None]) -> None:
        """Have ``tell`` called, on the event loop, with all that it says once that has changed."""
        self._on_change.append(tell)

    def authenticator(self) -> Authenticator:
        """One that knows the keys of the file, and those of the files that come after it."""
        authenticator = Authenticator(self.access.caller_of_key)
        self.on_change(lambda access: authenticator.adopt(access.caller_of_key))
        return authenticator

    async def watch(self) -> None:
        """Look for ever."""
        while True:
            await asyncio.sleep(LOOK_INTERVAL_S)
            await self.look()

    async def look(self) -> None:
        """Look once, beside the event loop: a file may lie on a slow disk."""
        try:
            access = await asyncio.to_thread(self._read_changed)
        except PageframeError as error:
            _log.warning("access_file_refused", reason=error.reason, message=error.message)
            return
        if access is None:
            return
        self.access = access
        _log.info("access_file_read", path=str(self._path), num_keys=len(access.caller_of_key))
        for tell in self._on_change:
            tell(access)

    def _read_changed(self) -> Access | None:
        signature = self._signature()
        if self._path is None or signature == self._seen:
            return None
        # First of all, so that what is wrong with a file is said once.
        self._seen = signature
        return read_access(self._path)

    def _signature(self) -> _Signature | None:
        """Tells one file from another that is put in its place, and from itself changed."""
        if self._path is None:
            return None
        try:
            status = os.stat(self._path)
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino
