"""Starts a service process, so that it never outlives its supervisor and no signal is lost.

A child leads its own process group, so Ctrl-C in the terminal reaches only the supervisor, which
drains in order. The kernel signals the child when the supervisor dies in any way
(``PR_SET_PDEATHSIG``), so nothing is ever left behind. Signals that come while it is
being started are held back on both sides, until it is known here and itself there.

Imports little: a process may be started before everything else (see ``ahead``).
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from pageframe.cli.exit_codes import EXIT_FAILURE
from pageframe.rpc.ready import READY_FD_VARIABLE

# Nobody uses gRPC between fork and exec. With its support for those who do, it starts a thread
# there, whose files are closed a moment later; that ends the child. Said before gRPC is imported.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

_PR_SET_PDEATHSIG = 1
# Loaded here, not between fork and exec, where nothing may be imported or locked.
_LIBC = ctypes.CDLL(None, use_errno=True)
_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Spawned(NamedTuple):
    """A started process, its output in a pipe, and the end of another one that brings reports."""

    process: "subprocess.Popen[bytes]"
    reports_fd: int


def module_command(name: str, *arguments: str) -> tuple[str, ...]:
    """How a module of ours is run."""
    # -P: the folder a person happens to stand in must not shadow a library.
    return (sys.executable, "-P", "-m", name, *arguments)


def spawn(
    argv: Sequence[str],
    environ: Mapping[str, str],
    *,
    death_signal: signal.Signals = signal.SIGKILL,
    unblocks_signals: bool = False,
    is_told: bool = False,
) -> Spawned:
    """Start a process, or leave none behind. To be called on the main thread.

    Args:
        argv: Program and arguments.
        environ: The whole environment, but for where to report.
        death_signal: What the kernel sends it when this process dies.
        unblocks_signals: Whether it begins with SIGINT and SIGTERM blocked.
        is_told: Whether its standard input is a pipe from here.

    Raises:
        OSError: the program cannot be run.
    """
    read_fd, write_fd = os.pipe()
    try:
        process = _start(
            argv,
            {**environ, READY_FD_VARIABLE: str(write_fd)},
            write_fd,
            subprocess.PIPE if is_told else subprocess.DEVNULL,
            death_signal,
            unblocks_signals,
        )
    except BaseException:
        os.close(read_fd)
        raise
    finally:
        os.close(write_fd)
    return Spawned(process, read_fd)


def _start(
    argv: Sequence[str],
    environ: Mapping[str, str],
    write_fd: int,
    stdin: int,
    death_signal: signal.Signals,
    unblocks_signals: bool,
) -> "subprocess.Popen[bytes]":
    process: subprocess.Popen[bytes] | None = None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING_SIGNALS)
    try:
        try:
            process = subprocess.Popen(
                argv,
                env=environ,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(write_fd,),
                process_group=0,
                preexec_fn=_in_child(death_signal, os.getpid(), None if unblocks_signals else mask),
            )
        finally:
            # What was held back arrives here, and may raise.
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    except BaseException:
        if process is not None:
            process.kill()
            process.wait()
        raise
    return process


def _in_child(
    death_signal: signal.Signals, parent_pid: int, mask: set[int | signal.Signals] | None
) -> Callable[[], None]:
    """What the child does before it becomes its program; without a mask signals stay blocked."""

    def prepare() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(death_signal))
        # It may have died between the fork and the line above; then no signal will come.
        if os.getppid() != parent_pid:
            os._exit(EXIT_FAILURE)
        # A handler of the parent would tell the parent, through the pipe that both have.
        for number in _ENDING_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    return prepare
