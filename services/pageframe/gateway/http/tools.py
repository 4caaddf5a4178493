"""``tools``, ``tool_choice`` and ``parallel_tool_calls``: what the model is told, and held to.

                      no function is strict          one is
auto                  free, calls are looked for     free text, calls held to the schemas
required, by name,    nothing but calls, held to     the same
allowed_tools         the schemas as far as may be
none                  the model is told of no tool
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pageframe.core.errors import InvalidRequestError, PageframeError
from pageframe.core.grammar import Grammar
from pageframe.core.limits import LIMITS
from pageframe.gateway.chat import Tool
from pageframe.gateway.generation import GenerationService
from pageframe.gateway.http.fields import Fields, malformed, unimplemented
from pageframe.gateway.http.tool_calls import CLOSE_TAG
from pageframe.gateway.http.tool_grammar import Function, argument_grammars, call_grammar

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """What a request says of tools.

    Attributes:
        tools: Those that the model is told of.
        grammar: What holds its calls; None where it is free.
        stop: With which texts an output ends because of its calls.
        arguments: What the arguments of each function are held to, by the field that says so.
    """

    tools: tuple[Tool, ...] = ()
    grammar: Grammar | None = None
    stop: tuple[str, ...] = ()
    arguments: Mapping[str, Grammar] | None = None

    async def check(self, service: GenerationService) -> None:
        """Refuse schemas that cannot be held to, naming the first.

        Raises:
            InvalidRequestError: GRAMMAR_INVALID, GRAMMAR_TOO_COMPLEX or GRAMMAR_SIZE_OUT_OF_RANGE.
        """
        if self.grammar is None:
            return
        try:
            self.grammar.validate()
            await service.check_grammar(self.grammar)
        except InvalidRequestError as error:
            if error.reason == "GRAMMAR_INVALID":
                await self._check_each(service)
            raise _about(error, "tools") from None

    async def _check_each(self, service: GenerationService) -> None:
        # All together were read within their time, and so is each.
        for path, grammar in (self.arguments or {}).items():
            try:
                await service.check_grammar(grammar)
            except InvalidRequestError as error:
                raise _about(error, path) from None


def read_tool_use(fields: Fields) -> ToolUse:
    """Read the three fields.

    Raises:
        InvalidRequestError: reason FIELD_MALFORMED, UNKNOWN_FIELD, TOO_MANY_TOOLS, UNKNOWN_TOOL or
            TOOL_CHOICE_WITHOUT_TOOLS.
        UnimplementedError: reason UNIMPLEMENTED_FEATURE, for what is no function.
    """
    read = fields.items("tools", _read_tool)
    is_parallel = fields.flag("parallel_tool_calls", True)
    choice = fields.take("tool_choice")
    _check_count(len(read))
    functions = [function for _, function in read]
    tools = tuple(tool for tool, _ in read)
    if choice == "none" or (not tools and choice in (None, "auto")):
        return ToolUse()
    if choice is None or choice == "auto":
        if not any(function.is_strict for function in functions):
            # One call at most is one whose end ends the output; it is read without its closing tag.
            return ToolUse(tools=tools, stop=() if is_parallel else (CLOSE_TAG,))
        return _held(tools, functions, is_forced=False, is_parallel=is_parallel)
    if choice == "required":
        called, is_forced = functions, True
    elif isinstance(choice, dict):
        called, is_forced, is_parallel = _read_choice(choice, functions, is_parallel)
    else:
        raise malformed("tool_choice", choice, "none, auto, required or an object")
    if not called:
        raise InvalidRequestError(
            "TOOL_CHOICE_WITHOUT_TOOLS",
            "tool_choice asks for a call, and there are no tools",
            field="tool_choice",
        )
    return _held(tools, called, is_forced=is_forced, is_parallel=is_parallel)


def _held(
    tools: tuple[Tool, ...], functions: Sequence[Function], *, is_forced: bool, is_parallel: bool
) -> ToolUse:
    return ToolUse(
        tools=tools,
        grammar=call_grammar(functions, is_forced=is_forced, is_parallel=is_parallel),
        arguments=argument_grammars(functions),
    )


def _read_choice(
    value: object, functions: Sequence[Function], is_parallel: bool
) -> tuple[list[Function], bool, bool]:
    """A ``tool_choice`` that names functions: those, whether one must be called, and many may."""
    choice = Fields.of(value, "tool_choice")
    kind = choice.text("type")
    if kind == "function":
        named = [_read_name(choice, functions)]
        choice.end()
        # Whoever names a function wants one call of it.
        return named, True, False
    if kind != "allowed_tools":
        raise unimplemented(f"tool_choice.type {kind[:40]!r}", "only functions are")
    allowed = choice.inner("allowed_tools")
    choice.end()
    mode = allowed.text("mode", "auto")
    if mode not in ("auto", "required"):
        raise malformed(allowed.path("mode"), mode, "auto or required")

    def read(entry: object, path: str) -> Function:
        fields = Fields.of(entry, path)
        if fields.text("type", "function") != "function":
            raise unimplemented(fields.path("type"), "only functions are")
        function = _read_name(fields, functions)
        fields.end()
        return function

    named = allowed.items("tools", read)
    allowed.end()
    return named, mode == "required", is_parallel


def _read_name(fields: Fields, functions: Sequence[Function]) -> Function:
    inner = fields.inner("function")
    name = inner.text("name")
    inner.end()
    for function in functions:
        if function.name == name:
            return function
    raise InvalidRequestError(
        "UNKNOWN_TOOL",
        f"{inner.path('name')} is {name[:64]!r}; none of the {len(functions)} tools has this name",
        field=inner.path("name"),
        num_tools=len(functions),
    )


def _read_tool(value: object, path: str) -> tuple[Tool, Function]:
    """A tool as templates tell of it, and what is known of its calls."""
    fields = Fields.of(value, path)
    kind = fields.text("type", "function")
    if kind != "function":
        raise unimplemented(f"{path}.type {kind[:40]!r}", "only functions are")
    inner = fields.inner("function")
    fields.end()
    name = inner.text("name")
    if not _NAME.fullmatch(name):
        raise malformed(inner.path("name"), name, "1 to 64 letters, digits, dots, dashes or _")
    described: dict[str, object] = {"name": name, "description": inner.text("description")}
    parameters = inner.take("parameters")
    if parameters is not None:
        if not isinstance(parameters, dict):
            raise malformed(inner.path("parameters"), parameters, "an object")
        described["parameters"] = parameters
    is_strict = inner.flag("strict")
    inner.end()
    function = Function(
        name=name, parameters=parameters, is_strict=is_strict, path=f"{path}.function"
    )
    return {"type": "function", "function": described}, function


def _check_count(num_tools: int) -> None:
    if num_tools > LIMITS.num_tools_max:
        raise InvalidRequestError(
            "TOO_MANY_TOOLS",
            f"there are {num_tools} tools; at most {LIMITS.num_tools_max} are allowed",
            field="tools",
            num_tools=num_tools,
            num_tools_max=LIMITS.num_tools_max,
        )


def _about(error: PageframeError, field: str) -> InvalidRequestError:
    """The same error, in the words of the field that it is about."""
    message = f"calls cannot be held to {field}: {error.message}"
    return InvalidRequestError(error.reason, message, **(dict(error.limits) | {"field": field}))
