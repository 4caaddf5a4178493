r"""Finding the first of several stop strings in text that arrives in pieces.

One automaton (Aho and Corasick 1975) reads every character once, whatever the number of strings.
Its state is a node of the tree of all prefixes, and that is the one quantity needed: the *depth* of
the state is the length of the longest tail of the text that could still become a stop string, so
exactly that many characters are held back.

    stop strings  "\n\nUser:", "END"
    text so far   "... the E"      state "E", depth 1: "... the " may go out, "E" waits
    next piece    "arth"           state root, depth 0: "Earth" may go out

The string that *ends* first wins, and the longest of those: so the result does not depend on how
the text was cut into pieces.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A stop string that was found.

    Attributes:
        stop: The string.
        end: Offset behind its last character, counted from where the matcher began to look.
    """

    stop: str
    end: int

    @property
    def start(self) -> int:
        """Offset of its first character."""
        return self.end - len(self.stop)


class StopAutomaton:
    """All stop strings of a request; immutable, shared by its samples."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Build it; time and memory grow with the characters of all strings together.

        No string may be empty.
        """
        assert all(stops), "an empty stop string would end every output at once"
        self._children: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._found: list[str | None] = [None]
        for stop in stops:
            self._insert(stop)
        self._fallback = [0] * len(self._depth)
        self._link()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to look for."""
        return len(self._depth) == 1

    def depth(self, state: int) -> int:
        """How many of the last characters could still become a stop string."""
        return self._depth[state]

    def advance(self, state: int, text: str) -> tuple[int, int, str | None]:
        """Read ``text`` from ``state`` up to the first stop string.

        Returns:
            The new state, the number of characters read, and the string found or None.
        """
        children, fallback, found = self._children, self._fallback, self._found
        for position, character in enumerate(text):
            following = children[state].get(character)
            while following is None and state:
                state = fallback[state]
                following = children[state].get(character)
            state = following or 0
            if found[state] is not None:
                return state, position + 1, found[state]
        return state, len(text), None

    def _insert(self, stop: str) -> None:
        node = 0
        for character in stop:
            child = self._children[node].get(character)
            if child is None:
                child = len(self._depth)
                self._children[node][character] = child
                self._children.append({})
                self._depth.append(self._depth[node] + 1)
                self._found.append(None)
            node = child
        self._found[node] = stop

    def _link(self) -> None:
        """Point each node to its longest proper tail in the tree, nearest to the root first."""
        queue = deque(self._children[0].values())
        while queue:
            node = queue.popleft()
            for character, child in self._children[node].items():
                queue.append(child)
                tail = self._fallback[node]
                while tail and character not in self._children[tail]:
                    tail = self._fallback[tail]
                self._fallback[child] = self._children[tail].get(character, 0)
                # The longest string that ends here is the node itself, else its tail's.
                self._found[child] = self._found[child] or self._found[self._fallback[child]]


class StopMatcher:
    """Looks for stop strings in one stream of text, and holds back what may become one."""

    def __init__(self, automaton: StopAutomaton, *, include_stop: bool = False) -> None:
        """``include_stop`` leaves the stop string in the text; then nothing need be held back."""
        self._automaton = automaton
        self._include_stop = include_stop
        self._state = 0
        self._held = ""
        self._num_characters = 0
        self.match: StopMatch | None = None

    @property
    def num_characters(self) -> int:
        """Characters taken so far, up to and with the stop string once it is found."""
        return self._num_characters

    def feed(self, text: str) -> str:
        """Take text; return what may go out. Text behind the stop string is dropped."""
        if self._automaton.is_empty:
            self._num_characters += len(text)
            return text
        assert self.match is None, f"text fed after the stop string {self.match}"
        self._state, num_read, stop = self._automaton.advance(self._state, text)
        self._num_characters += num_read
        pending = self._held + text[:num_read]
        if stop is not None:
            self.match = StopMatch(stop, self._num_characters)
            self._held = ""
            return pending if self._include_stop else pending[: len(pending) - len(stop)]
        num_held = 0 if self._include_stop else self._automaton.depth(self._state)
        border = len(pending) - num_held
        self._held = pending[border:]
        return pending[:border]

    def flush(self) -> str:
        """Return what was held back; the text has ended without a stop string."""
        held, self._held = self._held, ""
        return held
