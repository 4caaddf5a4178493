"""Finds what should be gone: objects of some kinds that can still be reached from a root.

No part has to be asked, so none can be forgotten, and a part that is written tomorrow is searched
as well.
"""

import gc
from array import array
from asyncio import AbstractEventLoop
from collections.abc import Iterable
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import NamedTuple

_NOT_ENTERED = (
    *(ModuleType, type, CodeType, FrameType, BuiltinFunctionType, str, bytes, int, float),
    # Timers of dead processes lead to what died with them.
    AbstractEventLoop,
)
# Most of what there is, and it leads nowhere.
_LEAVES = frozenset(
    {*(str, bytes, bytearray, int, float, bool, type(None), array), *(CodeType, type)}
)


class Found(NamedTuple):
    """Something that can still be reached, and the types of what leads to it, from the root."""

    thing: object
    path: str


def reachable(roots: Iterable[object], kinds: tuple[type, ...]) -> list[Found]:
    """Objects of ``kinds`` that ``roots`` lead to, not through modules and classes."""
    found: list[Found] = []
    leads_to: dict[int, object] = {}
    ahead: list[tuple[object, object]] = [(root, None) for root in roots]
    while ahead:
        thing, source = ahead.pop()
        if id(thing) in leads_to or isinstance(thing, _NOT_ENTERED):
            continue
        leads_to[id(thing)] = source
        if isinstance(thing, kinds):
            found.append(Found(thing, _path(thing, leads_to)))
        elif isinstance(thing, FunctionType):
            # Its globals are a module's; what it closes over is its own.
            cells = thing.__closure__ or ()
            ahead += [(cell.cell_contents, thing) for cell in cells if _is_set(cell)]
        elif isinstance(thing, MethodType):
            ahead.append((thing.__self__, thing))
        else:
            children = gc.get_referents(thing)
            ahead += [(child, thing) for child in children if type(child) not in _LEAVES]
    return found


def _path(thing: object, leads_to: dict[int, object]) -> str:
    names = []
    while thing is not None:
        names.append(type(thing).__name__)
        thing = leads_to[id(thing)]
    return " > ".join(reversed(names))


def _is_set(cell: object) -> bool:
    return bool(gc.get_referents(cell))
