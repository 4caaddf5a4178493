"""What a start does not wait for: garbage among modules, and modules that nothing here asks for.

    collecting_no_garbage   the collector looks at nothing that comes in the block
    without                 packages that a library takes only if they are there, are not there
    postponed               a module is loaded when somebody asks it for something

Standard library alone: it is there before everything else is imported.
"""

import contextlib
import gc
import importlib.abc
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


@contextlib.contextmanager
def collecting_no_garbage() -> Iterator[None]:
    """Import or load in the block, without looking for garbage among what is there to stay.

    Modules and weights live as long as the process. While they come, the collector would go through
    all that came before, again and again; behind the block it never looks at them any more.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def without(*packages: str) -> Iterator[None]:
    """Import in the block as if packages were not installed; those that are imported already stay.

    For a library that imports another one if it can, for something that we do not ask of it.
    """
    hidden = [package for package in packages if package not in sys.modules]
    # The import system's own word for a module that is not to be had.
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for package in hidden:
            del sys.modules[package]


@contextlib.contextmanager
def postponed(*names: str) -> Iterator[None]:
    """Import in the block, but load the named modules only when asked for something in them.

    An ``import`` of such a module is done at once and does nothing. It is loaded by the first look
    at a name in it, now or ever after, or by ``load_postponed``; what loading it does besides has
    not happened before that. Python's own ``importlib.util.LazyLoader`` would load it as soon as a
    second module imports it, since that looks whether the first import has ended.
    """
    finder = _PostponingFinder(frozenset(names))
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


def load_postponed(name: str) -> None:
    """Load a module that was postponed, unless it has been loaded or was never imported."""
    load = getattr(sys.modules.get(name), "__dict__", {}).get("__getattr__")
    if isinstance(load, _Postponed):
        load.load()


class _PostponingFinder(importlib.abc.MetaPathFinder):
    """Finds the named modules as always, and gives them a loader that waits."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self._names:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _WaitingLoader(spec.loader)
        return spec


class _WaitingLoader(importlib.abc.Loader):
    """Makes a module that is loaded by its ``__getattr__`` (PEP 562)."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__getattr__"] = _Postponed(module, self._loader)


class _Postponed:
    """The ``__getattr__`` of a module that has not been loaded."""

    def __init__(self, module: ModuleType, loader: importlib.abc.Loader) -> None:
        self._module = module
        self._loader = loader

    def load(self) -> None:
        module = self._module
        # First, for the module may look at itself while it is loaded.
        del vars(module)["__getattr__"]
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)

    def __call__(self, name: str) -> Any:
        # Whoever goes through all modules looks at such names, and wants nothing of what is in it.
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(f"module {self._module.__name__!r} has no attribute {name!r} yet")
        self.load()
        return getattr(self._module, name)
