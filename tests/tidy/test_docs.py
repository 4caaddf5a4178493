"""Documents say what the code says: settings, modules, trace vocabulary, links."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pageframe.config.settings import (
    OPTION_FIELDS,
    OTHER_VARIABLES,
    Settings,
    load_settings,
    variable_name,
)
from pageframe.core.request import StallCause
from pageframe.core.trace import KvCause, KvOperation

_ROOT = Path(__file__).resolve().parents[2]
_DOCS = _ROOT / "docs"
_SOURCE_ROOTS = ("services", "shared", "kernels")
_TABLE_ROW = re.compile(r"^\| `([^`]+)` \|(.*)\|$", re.M)


def _text(name: str) -> str:
    return (_DOCS / name).read_text(encoding="utf-8")


def _setting_rows() -> dict[str, list[str]]:
    """TOML key to default, flag, variable and meaning."""
    rows = {}
    for key, rest in _TABLE_ROW.findall(_text("settings.md")):
        cells = [cell.strip().strip("`") for cell in rest.split(" | ")]
        if len(cells) == 4:
            assert key not in rows, f"{key} has two rows"
            rows[key] = cells
    return rows


def _modules_in_tree() -> list[str]:
    return sorted(
        str(path.relative_to(_ROOT))
        for root in _SOURCE_ROOTS
        for path in (_ROOT / root / "pageframe").rglob("*.py")
        if path.name != "__init__.py" and "v1" not in path.parts
    )


def _modules_in_architecture() -> Iterator[str]:
    """Paths of the module list: a heading names the folder, a line below it the file."""
    folder = ""
    for line in _text("architecture.md").splitlines():
        if heading := re.fullmatch(r"### `([^`]+)`", line):
            folder = heading[1]
        elif folder and (entry := re.fullmatch(r"- `([^`]+\.py)`: \S.*\.", line)):
            yield f"{folder}/{entry[1]}"


def _documents() -> list[Path]:
    return sorted([*_ROOT.glob("*.md"), *_DOCS.rglob("*.md")])


def test_every_setting_has_one_row_with_its_four_spellings():
    rows = _setting_rows()
    assert set(rows) == set(OPTION_FIELDS)
    for option, (_, flag, variable, meaning) in rows.items():
        assert flag == f"--{option}"
        assert variable == variable_name(option)
        assert meaning.endswith(".")


def test_documented_defaults_are_the_defaults(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    written = {option: cells[0] for option, cells in _setting_rows().items()}
    assert load_settings(written, {}, working_dir=tmp_path) == Settings()


def test_the_example_file_is_accepted(tmp_path):
    (example,) = re.findall(r"```toml\n(.*?)```", _text("settings.md"), re.S)
    path = tmp_path / "pageframe.toml"
    path.write_text(example, encoding="utf-8")
    assert load_settings({}, {}, config_path=path).kv_memory_bytes == 2 * 1024**3


def test_every_other_variable_is_explained():
    for name in OTHER_VARIABLES:
        assert f"`{name}`" in _text("settings.md"), f"{name} is not in docs/settings.md"


def test_every_module_has_exactly_one_line_in_the_architecture():
    listed = list(_modules_in_architecture())
    tree = _modules_in_tree()
    assert sorted(set(tree) - set(listed)) == [], "modules without a line"
    assert sorted(set(listed) - set(tree)) == [], "lines without a module"
    assert sorted(listed) == tree, "modules with two lines"


@pytest.mark.parametrize("vocabulary", [StallCause, KvCause])
def test_every_cause_is_explained(vocabulary):
    explained = {name for name, _ in _TABLE_ROW.findall(_text("debugging.md"))}
    missing = {member.name.lower() for member in vocabulary} - explained
    assert not missing


def test_every_operation_is_named():
    debugging = _text("debugging.md")
    missing = [
        operation.span_name
        for operation in KvOperation
        if f"`{operation.span_name}`" not in debugging
    ]
    assert not missing


@pytest.mark.parametrize("document", _documents(), ids=lambda path: str(path.relative_to(_ROOT)))
def test_relative_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if "://" not in target and not target.startswith("#"):
            path = document.parent / target.partition("#")[0]
            assert path.exists(), f"{document.relative_to(_ROOT)} links to {target}"


def test_source_paths_in_the_architecture_exist():
    """Short paths such as ``scheduler/planner.py`` name files below some source root."""
    prose = _text("architecture.md").partition("\n## Modules\n")[0]
    named = set(re.findall(r"`([a-z_]+/[a-z_/]+\.py)`", prose))
    assert named, "the architecture names no modules"
    tree = [f"/{path}" for path in _modules_in_tree()]
    lost = sorted(name for name in named if not any(path.endswith(f"/{name}") for path in tree))
    assert not lost


def test_results_name_no_home_folder_of_who_measured():
    named = [
        str(path.relative_to(_ROOT))
        for path in sorted((_ROOT / "bench" / "results").rglob("*.json"))
        if re.search(r'"/(?:root|home)/', path.read_text(encoding="utf-8"))
    ]
    assert not named, named
