"""Modules that a start does without: hidden, or loaded when somebody asks."""

import contextlib
import importlib
import sys

import pytest

from pageframe.config.imports import load_postponed, postponed, without

SOURCE = """
import late_notes
late_notes.append("loaded")
VALUE = 7
"""


@pytest.fixture
def notes(tmp_path, monkeypatch):
    """A module ``late_part`` in a package, and a list of how often it was loaded."""
    package = tmp_path / "late_package"
    package.mkdir()
    (package / "__init__.py").write_text("from late_package import late_part\n")
    (package / "late_part.py").write_text(SOURCE)
    (package / "other.py").write_text("import late_package.late_part\n")
    monkeypatch.syspath_prepend(tmp_path)
    taken: list[str] = []
    monkeypatch.setitem(sys.modules, "late_notes", taken)
    yield taken
    for name in [name for name in sys.modules if name.startswith("late_package")]:
        del sys.modules[name]


def import_package():
    with postponed("late_package.late_part"):
        package = importlib.import_module("late_package")
        importlib.import_module("late_package.other")
    return package


def test_a_postponed_module_is_loaded_once_by_the_first_look_at_a_name_in_it(notes):
    package = import_package()
    assert notes == []
    assert package.late_part.__name__ == "late_package.late_part"
    assert not hasattr(package.late_part, "__path__")
    assert notes == []
    assert package.late_part.VALUE == 7
    assert package.late_part.VALUE == 7
    assert notes == ["loaded"]
    with pytest.raises(AttributeError, match="no attribute 'MISSING'"):
        _ = package.late_part.MISSING


def test_a_name_can_be_imported_from_a_postponed_module(notes):
    import_package()
    importlib.import_module("late_package.other")
    namespace: dict[str, object] = {}
    exec("from late_package.late_part import VALUE", namespace)
    assert namespace["VALUE"] == 7
    assert notes == ["loaded"]


def test_a_postponed_module_can_be_asked_for(notes):
    package = import_package()
    load_postponed("late_package.late_part")
    load_postponed("late_package.late_part")
    assert notes == ["loaded"]
    assert package.late_part.__spec__.loader.__class__.__name__ == "SourceFileLoader"
    importlib.reload(package.late_part)
    assert notes == ["loaded", "loaded"]


def test_nobody_is_postponed_behind_the_block_and_what_was_never_imported_is_no_matter(notes):
    with postponed("late_package.late_part"):
        pass
    load_postponed("late_package.late_part")
    importlib.import_module("late_package")
    assert notes == ["loaded"]


def test_a_module_that_fails_says_so_to_whoever_looked(notes, tmp_path):
    (tmp_path / "late_package" / "late_part.py").write_text("1 / 0")
    package = import_package()
    with pytest.raises(ZeroDivisionError):
        _ = package.late_part.VALUE


def test_a_hidden_package_cannot_be_imported_in_the_block_and_can_behind_it(notes):
    with without("late_package"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("late_package")
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("late_package.other")
    assert importlib.import_module("late_package").late_part.VALUE == 7


def test_what_is_imported_already_is_not_hidden(notes):
    package = importlib.import_module("late_package")
    with contextlib.suppress(ZeroDivisionError), without("late_package"):
        assert importlib.import_module("late_package") is package
        raise ZeroDivisionError
    assert sys.modules["late_package"] is package
