"""Start and stop the exporter process."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


class ExporterProcess:
    """The exporter, run beside the services by whoever started them.

    It ends by itself when this process dies, however that happens, after it has drained the rings.
    """

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process

    @classmethod
    def start(
        cls,
        rings: Sequence[Path],
        state_dir: Path,
        *,
        is_lossless: bool = False,
        file_stem: str = "pageframe",
        environment: Mapping[str, str] | None = None,
    ) -> "ExporterProcess":
        """Start it; rings may appear later.

        Args:
            rings: One path per service.
            state_dir: For trace files and the spool.
            is_lossless: Never delete old trace files; for ``--trace audit``.
            file_stem: Name of the trace file; give each exporter on a state folder its own.
            environment: Of the process; this one's when None.
        """
        command = [sys.executable, "-m", "pageframe.telemetry", "--state-dir", str(state_dir)]
        command += ["--parent-pid", str(os.getpid()), "--file-stem", file_stem]
        for ring in rings:
            command += ["--ring", str(ring)]
        if is_lossless:
            command.append("--lossless")
        # The child inherits the mask and lifts it once it can drain: a signal that comes while
        # Python is still importing waits, where it would end the process with its rings unread.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=None if environment is None else dict(environment),
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return cls(process)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def stop(self, timeout_s: float = 15.0) -> int:
        """Ask it to drain and end, kill it if it does not; its exit code.

        Call it when the services have ended: what they record later is not waited for.
        """
        self._process.terminate()
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()
