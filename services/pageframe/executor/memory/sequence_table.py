"""All known sequences, and the rows in which the running ones stand.

The simple thing is an object per sequence with a list of tokens, walked once per step. Here the
running sequences stand in rows of persistent arrays, so a step over 256 of them is a handful of
array instructions; an object per sequence remains for what changes rarely. A sequence that is not
running takes its tokens along in an array of its own and leaves its row to others.
"""

import enum
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pageframe.core.sampling import SamplingParams
from pageframe.executor.batch import Int32Array
from pageframe.executor.block_moves import Int64Array
from pageframe.executor.memory.block_keys import BlockKey
from pageframe.executor.memory.key_chain import KeyChain

NO_ROW = -1
_TOKENS_PER_ROW_MIN = 256
_NO_TOKENS: Int32Array = np.empty(0, dtype=np.int32)


@enum.unique
class SequenceState(enum.IntEnum):
    """Life of a sequence; finished ones are forgotten."""

    ANNOUNCED = 1
    RUNNING = 2
    PREEMPTED = 3


class SwappedTail(NamedTuple):
    """A logical block that is not full, under keys of its own.

    Attributes:
        keys: Its block of each group is found under this key alone.
        depth: Its logical index.
        num_tokens: Computed tokens in it.
    """

    keys: tuple[BlockKey, ...]
    depth: int
    num_tokens: int


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """What is known of one sequence besides its row.

    Attributes:
        sequence_id: Given by the scheduler.
        generation: Counts preemptions.
        num_prompt_tokens: How many of its tokens are prompt.
        sampling: Sampling parameters.
        sample_index: Which of the request's samples.
        state: RUNNING exactly while it has a row.
        row: Its row, or ``NO_ROW``.
        parked_tokens: int32 [num_tokens], all its tokens while it has no row; else empty.
        request_id: The caller's name for its request.
        tenant_id: Who is charged for its blocks; see ``block_columns.Tenants``.
        keys: Keys of its full blocks, in the first group of layers.
        more_keys: The same in the other groups.
        is_steered: Whether it takes no token unless an entry of a plan names it.
        session_id: Turns of one chat; empty for none.
        trace_context: Trace id, and span id of its sequence span; may be empty.
        has_run: Whether it ever had a row.
        num_blocks_peak: Most blocks it held before it last gave some up.
        num_blocks_shared: Blocks it used without allocating them.
        num_copies_on_write: Blocks copied because it wrote into a shared one.
        num_cached_tokens: Tokens found in the prefix index at its first admission.
        num_preemptions: How often it lost blocks.
        num_draft_tokens: Draft tokens that were computed for it.
        num_accepted_tokens: Those of them that it kept.
        swapped_tail: Its last, partly filled block while it is swapped out.
        host_keys: Blocks that the host tier holds for it while it is swapped out.
    """

    sequence_id: int
    generation: int
    num_prompt_tokens: int
    sampling: SamplingParams
    sample_index: int
    parked_tokens: Int32Array
    keys: KeyChain
    request_id: str = ""
    tenant_id: int = 0
    more_keys: tuple[KeyChain, ...] = ()
    is_steered: bool = False
    session_id: str = ""
    trace_context: tuple[bytes, bytes] = (b"", b"")
    state: SequenceState = SequenceState.ANNOUNCED
    row: int = NO_ROW
    has_run: bool = False
    num_blocks_peak: int = 0
    num_blocks_shared: int = 0
    num_copies_on_write: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    swapped_tail: SwappedTail | None = None
    host_keys: list[BlockKey] = field(default_factory=list)

    @property
    def chains(self) -> tuple[KeyChain, ...]:
        """Keys of its full blocks, in each group of layers."""
        return (self.keys, *self.more_keys)


class SequenceTable:
    """Sequences by id, and columns over the rows of those that run.

    Attributes:
        num_rows: Most sequences that run at once.
        tokens: int32 [num_rows, capacity]; of row ``r`` the first ``num_tokens[r]`` are valid.
            The capacity doubles when the longest running sequence needs it.
        num_tokens: int32 [num_rows], known tokens.
        num_computed: int32 [num_rows], tokens whose keys and values are in the pool; also the
            position of the next token to compute.
        generations: int32 [num_rows].
        num_published: int32 [num_rows], full blocks that were offered to the prefix index.
        tenant_ids: int32 [num_rows].
        is_steered: bool [num_rows], false in empty rows.
        sequence_ids: int64 [num_rows], 0 in empty rows.
    """

    def __init__(self, num_rows: int, max_model_len: int) -> None:
        self.num_rows = num_rows
        self.max_model_len = max_model_len
        capacity = min(max_model_len, _TOKENS_PER_ROW_MIN)
        self.tokens: Int32Array = np.zeros((num_rows, capacity), dtype=np.int32)
        self.num_tokens: Int32Array = np.zeros(num_rows, dtype=np.int32)
        self.num_computed: Int32Array = np.zeros(num_rows, dtype=np.int32)
        self.generations: Int32Array = np.zeros(num_rows, dtype=np.int32)
        self.num_published: Int32Array = np.zeros(num_rows, dtype=np.int32)
        self.tenant_ids: Int32Array = np.zeros(num_rows, dtype=np.int32)
        self.is_steered: NDArray[np.bool_] = np.zeros(num_rows, dtype=np.bool_)
        self._num_steered = 0
        self.sequence_ids: NDArray[np.int64] = np.zeros(num_rows, dtype=np.int64)
        self._by_id: dict[int, Sequence] = {}
        self._at_row: list[Sequence | None] = [None] * num_rows
        self._empty_rows = list(range(num_rows - 1, -1, -1))
        # 64 bits, as NumPy indexes: other indices it converts first, in every call.
        self._join_order: Int64Array = np.zeros(num_rows, dtype=np.int64)
        self._num_running = 0

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def num_empty_rows(self) -> int:
        """How many more sequences may run."""
        return len(self._empty_rows)

    @property
    def has_empty_row(self) -> bool:
        """Whether one more sequence may run."""
        return bool(self._empty_rows)

    def get(self, sequence_id: int) -> Sequence | None:
        """The sequence, or None when it is not known."""
        return self._by_id.get(sequence_id)

    def by_id(self, sequence_id: int) -> Sequence:
        """The sequence, which has to be known."""
        return self._by_id[sequence_id]

    def all(self) -> list[Sequence]:
        """All known sequences, oldest announcement first, in a new list."""
        return list(self._by_id.values())

    def at_row(self, row: int) -> Sequence:
        """The sequence that runs in ``row``."""
        sequence = self._at_row[row]
        assert sequence is not None, f"nobody runs in row {row}"
        return sequence

    def running_rows(self) -> Int64Array:
        """Rows in use in join order, int64 [n]; a view, valid until the next change."""
        return self._join_order[: self._num_running]

    def caught_up_rows(self) -> Int64Array:
        """Rows that compute their newest token unasked, in join order, in a new array.

        They lack only that one, and are not steered.
        """
        rows = self.running_rows()
        lacks_one: NDArray[np.bool_] = self.num_tokens[rows] - self.num_computed[rows] == 1
        if self._num_steered:
            lacks_one &= ~self.is_steered[rows]
        return rows[lacks_one]

    def add(self, sequence: Sequence) -> None:
        """Know a new sequence, whose tokens are parked."""
        assert sequence.sequence_id not in self._by_id, f"sequence {sequence.sequence_id} twice"
        self._by_id[sequence.sequence_id] = sequence

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that has no row."""
        assert sequence.row == NO_ROW, f"{sequence.sequence_id} is in row {sequence.row}"
        del self._by_id[sequence.sequence_id]

    def seat(self, sequence: Sequence, num_computed: int = 0) -> None:
        """Give the sequence a row; there must be an empty one."""
        assert sequence.row == NO_ROW, f"{sequence.sequence_id} is in row {sequence.row}"
        row = self._empty_rows.pop()
        num_tokens = len(sequence.parked_tokens)
        self._reserve(num_tokens)
        self.tokens[row, :num_tokens] = sequence.parked_tokens
        self.num_tokens[row] = num_tokens
        self.num_computed[row] = num_computed
        self.num_published[row] = 0
        self.tenant_ids[row] = sequence.tenant_id
        self.is_steered[row] = sequence.is_steered
        self._num_steered += sequence.is_steered
        self.generations[row] = sequence.generation
        self.sequence_ids[row] = sequence.sequence_id
        self._at_row[row] = sequence
        self._join_order[self._num_running] = row
        self._num_running += 1
        sequence.parked_tokens = _NO_TOKENS
        sequence.row = row
        sequence.has_run = True
        sequence.state = SequenceState.RUNNING

    def unseat(self, sequence: Sequence) -> None:
        """Take the sequence out of its row; it keeps its tokens and nothing computed."""
        row = sequence.row
        sequence.parked_tokens = self.tokens[row, : self.num_tokens[row]].copy()
        sequence.row = NO_ROW
        sequence.state = SequenceState.PREEMPTED
        rows = self.running_rows()
        rest = rows[rows != row]
        self._num_running = len(rest)
        self._join_order[: self._num_running] = rest
        self.sequence_ids[row] = 0
        self._at_row[row] = None
        self.is_steered[row] = False
        self._num_steered -= sequence.is_steered
        self._empty_rows.append(row)

    def tokens_of_sequence(self, sequence: Sequence) -> Int32Array:
        """All its known tokens, in a row or parked; valid until the next change."""
        return sequence.parked_tokens if sequence.row == NO_ROW else self.tokens_of(sequence.row)

    def tokens_of(self, row: int) -> Int32Array:
        """A view of the row's tokens, int32 [num_tokens[row]]; valid until the next change."""
        return self.tokens[row, : self.num_tokens[row]]

    def append_tokens(self, rows: NDArray[np.integer], token_ids: Int32Array) -> None:
        """Add one token to each of ``rows``; both [n], rows without repetition."""
        if not len(rows):
            return
        self._reserve(int(self.num_tokens[rows].max()) + 1)
        self.tokens[rows, self.num_tokens[rows]] = token_ids
        self.num_tokens[rows] += 1

    def put_tokens(
        self, rows: NDArray[np.integer], positions: Int32Array, token_ids: Int32Array
    ) -> None:
        """Add tokens to the ends of rows; all [n].

        ``rows`` may repeat; then ``positions`` rise, one by one from the row's end.
        """
        self._reserve(int(positions.max(initial=-1)) + 1)
        self.tokens[rows, positions] = token_ids
        # Of a row that repeats the last position counts.
        self.num_tokens[rows] = positions + 1

    def put_drafts(self, row: int, token_ids: Int32Array) -> None:
        """Write tokens, int32 [n], behind those of ``row``, which does not have them for that."""
        end = int(self.num_tokens[row]) + len(token_ids)
        self._reserve(end)
        self.tokens[row, self.num_tokens[row] : end] = token_ids

    def _reserve(self, num_tokens: int) -> None:
        capacity = self.tokens.shape[1]
        if num_tokens <= capacity:
            return
        assert num_tokens <= self.max_model_len, f"{num_tokens} tokens of {self.max_model_len}"
        while capacity < num_tokens:
            capacity *= 2
        grown: Int32Array = np.zeros(
            (self.num_rows, min(capacity, self.max_model_len)), dtype=np.int32
        )
        grown[:, : self.tokens.shape[1]] = self.tokens
        self.tokens = grown
