"""How the exporter is called is how it reads it."""

from pathlib import Path

from pageframe.telemetry.__main__ import parse_arguments
from pageframe.telemetry.supervise import exporter_arguments

RINGS = [Path("a.ring"), Path("b.ring")]


def test_the_exporter_reads_its_arguments_as_they_were_meant():
    options = parse_arguments(
        exporter_arguments(
            RINGS,
            Path("state"),
            parent_pid=7,
            drain_seconds=2.5,
            is_lossless=True,
            file_stem="stem",
            spool_bytes_max=99,
        )
    )
    assert vars(options) == {
        "ring": RINGS,
        "state_dir": Path("state"),
        "parent_pid": 7,
        "drain_seconds": 2.5,
        "lossless": True,
        "file_stem": "stem",
        "spool_bytes": 99,
    }


def test_what_is_not_given_is_the_default_of_the_exporter():
    options = parse_arguments(exporter_arguments(RINGS, Path("state"), parent_pid=7))
    bare = ["--state-dir", "state", "--parent-pid", "7", "--ring", "a.ring", "--ring", "b.ring"]
    assert options == parse_arguments(bare)
