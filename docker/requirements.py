"""Writes what each image installs, to a file each: ``python3 requirements.py pyproject.toml OUT``.

The files change only when their own lines do, so an image's libraries stay in the builder's cache
while the rest of ``pyproject.toml`` moves. Standard library alone: nothing is installed yet.
"""

import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

EXTRAS_BY_IMAGE: Mapping[str, Sequence[str]] = {
    # What all images have; its layer is shared.
    "common": ("cli",),
    "gateway": ("cli", "gateway"),
    "executor-cpu": ("cli", "executor", "convert"),
    "executor-cuda": ("cli", "executor", "convert", "gpu"),
}
_OWN_EXTRAS = re.compile(r"pageframe\[([^\]]+)\]")


def requirements(project: Mapping[str, object], extras: Sequence[str]) -> Iterator[str]:
    """The lines of some extras, those of the extras that they name included.

    Args:
        project: The table ``project`` of ``pyproject.toml``.
        extras: Names of extras; one that does not exist is a KeyError.
    """
    tables: Mapping[str, Sequence[str]] = project["optional-dependencies"]  # type: ignore[assignment]
    for extra in extras:
        for line in tables[extra]:
            named = _OWN_EXTRAS.fullmatch(line)
            if named:
                yield from requirements(project, named[1].split(","))
            else:
                yield line


def main(arguments: Sequence[str]) -> None:
    """Write ``OUT/<image>.txt`` for every image."""
    pyproject, out = Path(arguments[0]), Path(arguments[1])
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    out.mkdir(parents=True, exist_ok=True)
    for image, extras in EXTRAS_BY_IMAGE.items():
        lines = {*project["dependencies"], *requirements(project, extras)}
        (out / f"{image}.txt").write_text("\n".join(sorted(lines)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
