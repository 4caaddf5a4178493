"""Whether grammars mean anything, before their requests are sent on: the library's own words.

The executor compiles a grammar again, over the model's vocabulary, and trusts nobody; but what it
could tell of a failure is a word. Checking may take seconds, so it is done by child processes, two
at a time, and what was checked is not checked again.
"""

import asyncio
from collections import OrderedDict
from typing import Final

from pageframe.core.errors import InvalidRequestError
from pageframe.core.grammar import Grammar
from pageframe.grammar.child import GrammarChild

_NUM_KEPT: Final = 1024
_NUM_AT_ONCE_MAX: Final = 2


class GrammarChecks:
    """Remembers what came of the grammars seen last; used on one event loop."""

    def __init__(self) -> None:
        self._outcomes: OrderedDict[Grammar, InvalidRequestError | None] = OrderedDict()
        self._idle = [GrammarChild() for _ in range(_NUM_AT_ONCE_MAX)]
        self._slots = asyncio.Semaphore(_NUM_AT_ONCE_MAX)

    async def check(self, grammar: Grammar) -> None:
        """Refuse what the library cannot follow.

        Raises:
            InvalidRequestError: GRAMMAR_INVALID, with the library's words, or GRAMMAR_TOO_COMPLEX.
        """
        if grammar not in self._outcomes:
            async with self._slots:
                # Others may have sent the same and been read meanwhile.
                if grammar not in self._outcomes:
                    self._outcomes[grammar] = await self._read(grammar)
            if len(self._outcomes) > _NUM_KEPT:
                self._outcomes.popitem(last=False)
        self._outcomes.move_to_end(grammar)
        error = self._outcomes[grammar]
        if error is not None:
            raise InvalidRequestError(error.reason, error.message, **error.limits)

    async def _read(self, grammar: Grammar) -> InvalidRequestError | None:
        child = self._idle.pop()
        try:
            await asyncio.to_thread(child.check, grammar)
        except InvalidRequestError as error:
            return error
        finally:
            self._idle.append(child)
        return None
