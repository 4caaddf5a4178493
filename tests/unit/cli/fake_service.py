"""A service of a few lines: BEHAVIOUR NAME JOURNAL.

It reports as a real one does, and writes what happened to it into the journal.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import types

behaviour, name, journal_name = sys.argv[1:4]
journal = pathlib.Path(journal_name)


def note(event: str) -> None:
    with journal.open("a") as file:
        file.write(f"{name} {event} {os.getpid()}\n")


def report(**content: object) -> None:
    os.write(int(os.environ["PAGEFRAME_READY_FD"]), (json.dumps(content) + "\n").encode())


def stop(_number: int, _frame: types.FrameType | None) -> None:
    note("stopped")
    raise SystemExit(0)


def serve() -> None:
    report(ready={"address": f"{name}:1234", "details": {}})
    note("ready")
    while True:
        signal.pause()


signal.signal(signal.SIGTERM, stop)
note("started")
if behaviour == "fail":
    report(failed={"reason": "NO_LUCK", "message": f"{name} has no luck today", "exit_code": 2})
    raise SystemExit(2)
if behaviour == "crash":
    sys.stderr.write("Traceback of a crash\n")
    raise SystemExit(3)
if behaviour == "silent":
    while True:
        signal.pause()
if behaviour == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if behaviour == "parent":
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    note(f"child={child.pid}")
if behaviour == "loads":
    report(progress={"message": "loading weights", "fraction": 0.5})
if behaviour == "warns":
    for line in (
        {"level": "warning", "event": "low_blocks", "free": 3},
        {"level": "info", "event": "quiet"},
    ):
        sys.stderr.write(json.dumps(line) + "\n")
if behaviour == "dies":
    report(ready={"address": f"{name}:1234", "details": {}})
    raise SystemExit(1)
if behaviour == "replaced":
    report(ready={"address": f"{name}:1234", "details": {}})
    raise SystemExit(3)
if behaviour == "dies_once":
    marker = journal.with_suffix(".died")
    if not marker.exists():
        marker.touch()
        report(ready={"address": f"{name}:1234", "details": {}})
        raise SystemExit(1)
serve()
