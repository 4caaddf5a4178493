"""What an output has to be: a JSON Schema, a regular expression, or a grammar of such parts."""

import enum
from dataclasses import dataclass

from pageframe.core.errors import InvalidRequestError
from pageframe.core.limits import LIMITS

JSON_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"
"""Between two parts of JSON, as an expression: an output must not go on for ever there, and this is
an indentation of 31."""


@enum.unique
class GrammarForm(enum.Enum):
    """In what a grammar is written. Values are the names of ``pageframe.v1.Grammar``'s fields."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"


@dataclass(frozen=True, slots=True)
class Grammar:
    """Holds of a whole output, from its first character to its last.

    Attributes:
        form: In what ``text`` is written.
        text: The schema as JSON, the expression, or rules in llguidance's variant of Lark, which
            may hold both.
    """

    form: GrammarForm
    text: str

    def validate(self) -> None:
        """Check the size; whether the text means anything is asked where the library is.

        Raises:
            InvalidRequestError: GRAMMAR_SIZE_OUT_OF_RANGE, or GRAMMAR_INVALID for what is no
                Unicode.
        """
        try:
            num_bytes = len(self.text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                "GRAMMAR_INVALID",
                f"{self.form.value} is no Unicode text: character {error.start} stands for none",
                field=self.form.value,
            ) from None
        if not 1 <= num_bytes <= LIMITS.grammar_bytes_max:
            raise InvalidRequestError(
                "GRAMMAR_SIZE_OUT_OF_RANGE",
                f"{self.form.value} has {num_bytes} bytes; it must have 1 to "
                f"{LIMITS.grammar_bytes_max}",
                field=self.form.value,
                num_bytes=num_bytes,
                num_bytes_max=LIMITS.grammar_bytes_max,
            )
