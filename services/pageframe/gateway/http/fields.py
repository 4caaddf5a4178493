"""Reads the fields of a JSON object by type, each once; what is left over was not known.

``null`` stands for a field that was left out, as OpenAI's API has it. Whether a number is in its
range is not asked here: that is ``validation``'s, the same for every door.
"""

from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

from pageframe.core.errors import InvalidRequestError, UnimplementedError

_T = TypeVar("_T")

_KINDS = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    type(None): "null",
}


class Fields:
    """One JSON object.

    Args:
        values: What was sent.
        path: Where it stands in the request, such as ``messages[0]``; empty for the request itself.
    """

    def __init__(self, values: Mapping[str, object], path: str = "") -> None:
        self._values = {name: value for name, value in values.items() if value is not None}
        self._path = path

    @classmethod
    def of(cls, value: object, path: str) -> "Fields":
        """Those of ``value``.

        Raises:
            InvalidRequestError: reason FIELD_MALFORMED, if it is no object.
        """
        if not isinstance(value, dict):
            raise malformed(path, value, "an object")
        return cls(value, path)

    def path(self, name: str) -> str:
        """Full name of a field, as errors give it."""
        return f"{self._path}.{name}" if self._path else name

    def take(self, name: str) -> object:
        """The value of a field, None if there is none; it counts as known from now on."""
        return self._values.pop(name, None)

    def text(self, name: str, default: str = "") -> str:
        """A text.

        Raises:
            InvalidRequestError: reason FIELD_MALFORMED.
        """
        value = self.take(name)
        return default if value is None else checked_text(value, self.path(name))

    def whole(self, name: str) -> int | None:
        """A whole number, or None; a number such as 5.0 counts as one.

        Raises:
            InvalidRequestError: reason FIELD_MALFORMED.
        """
        value = self.take(name)
        return None if value is None else checked_whole(value, self.path(name))

    def number(self, name: str, default: float) -> float:
        """A number.

        Raises:
            InvalidRequestError: reason FIELD_MALFORMED.
        """
        value = self.take(name)
        return default if value is None else checked_number(value, self.path(name))

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false.

        Raises:
            InvalidRequestError: reason FIELD_MALFORMED.
        """
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise malformed(self.path(name), value, "true or false")
        return value

    def items(self, name: str, read: Callable[[object, str], _T]) -> list[_T]:
        """A list; ``read`` is given each entry and its full name.

        Raises:
            InvalidRequestError: reason FIELD_MALFORMED.
        """
        value = self.take(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise malformed(self.path(name), value, "a list")
        return [read(entry, f"{self.path(name)}[{index}]") for index, entry in enumerate(value)]

    def inner(self, name: str) -> "Fields":
        """The fields of an object; none of one that was left out.

        Raises:
            InvalidRequestError: reason FIELD_MALFORMED.
        """
        value = self.take(name)
        return Fields.of({} if value is None else value, self.path(name))

    def ignore(self, names: Collection[str]) -> None:
        """Let fields pass that have no meaning here."""
        for name in names:
            self._values.pop(name, None)

    def refuse(self, name: str, why: str, *, allowed: Collection[object] = ()) -> None:
        """Refuse a feature that is known and not offered, unless its value asks for nothing.

        Raises:
            UnimplementedError: reason UNIMPLEMENTED_FEATURE.
        """
        value = self.take(name)
        if value is not None and not any(value == item for item in allowed):
            raise unimplemented(self.path(name), why)

    def end(self) -> None:
        """Refuse whatever was not read.

        Raises:
            InvalidRequestError: reason UNKNOWN_FIELD, naming the first.
        """
        for name in self._values:
            path = self.path(name)[:200]
            raise InvalidRequestError(
                "UNKNOWN_FIELD", f"the field {path!r} is not known here; leave it out", field=path
            )


def checked_text(value: object, path: str) -> str:
    """``value``, if it is a text.

    Raises:
        InvalidRequestError: reason FIELD_MALFORMED.
    """
    if not isinstance(value, str):
        raise malformed(path, value, "a text")
    return value


def checked_whole(value: object, path: str) -> int:
    """``value``, if it is a whole number.

    Raises:
        InvalidRequestError: reason FIELD_MALFORMED.
    """
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise malformed(path, value, "a whole number")
    return value


def checked_number(value: object, path: str) -> float:
    """``value``, if it is a number that fits a double.

    Raises:
        InvalidRequestError: reason FIELD_MALFORMED.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise malformed(path, value, "a number")
    try:
        return float(value)
    except OverflowError:
        raise malformed(path, value, "a number") from None


def malformed(path: str, value: object, wanted: str) -> InvalidRequestError:
    """The error for a field of the wrong kind."""
    kind = _KINDS.get(type(value), "something else")
    if isinstance(value, int | float) and not isinstance(value, bool):
        kind = f"{value!r:.40}" if not isinstance(value, int) or value.bit_length() < 64 else "huge"
    elif isinstance(value, str):
        kind = f"the text {value[:40]!r}"
    return InvalidRequestError(
        "FIELD_MALFORMED", f"{path} must be {wanted}, not {kind}", field=path
    )


def unimplemented(path: str, why: str) -> UnimplementedError:
    """The error for a feature that is known and not offered."""
    return UnimplementedError(
        "UNIMPLEMENTED_FEATURE", f"{path} is not offered here: {why}", field=path
    )
