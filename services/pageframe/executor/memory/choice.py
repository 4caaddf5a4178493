"""What of a plan must run, and who gives way for it: decided on numbers alone.

Nothing is changed here, so a refused plan has changed nothing. Victims are taken in order, and only
until what must run fits into the pool and into every tenant's quota; under sharing, that needs the
reference counts as they would be, which ``Forecast`` keeps.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from pageframe.core.plan import Entries, Recovery, StepPlan
from pageframe.executor.batch import Int32Array
from pageframe.executor.memory.kv_memory import KvMemory
from pageframe.executor.memory.sequence_table import NO_ROW, Sequence
from pageframe.executor.memory.sharing import rows_to_copy
from pageframe.executor.memory.yielding import num_own_yieldable, num_yieldable

BUILDS_ON_UNAPPLIED_STEP = "BUILDS_ON_UNAPPLIED_STEP"
MUST_DOES_NOT_FIT = "MUST_DOES_NOT_FIT"
STEP_TOKENS_EXCEEDED = "STEP_TOKENS_EXCEEDED"

_NO_ROWS: Int32Array = np.empty(0, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class Victim:
    """A running sequence that gives way."""

    sequence: Sequence
    recovery: Recovery
    num_tail_blocks: int


@dataclass(slots=True, kw_only=True)
class Choice:
    """What must run and who must go for it.

    ``has_writers``: whether anybody would write into a block that is not its own. ``own_yields``:
    blocks that idle sessions of a tenant give up for what the tenant runs, by tenant number.
    """

    refusal: str = ""
    decode_rows: Int32Array = field(default_factory=lambda: _NO_ROWS)
    has_writers: bool = False
    chunks: dict[int, int] = field(default_factory=dict)
    named_rows: set[int] = field(default_factory=set)
    victims: list[Victim] = field(default_factory=list)
    own_yields: dict[int, int] = field(default_factory=dict)
    stale_ids: list[int] = field(default_factory=list)


class Forecast:
    """What would be available if some rows gave up blocks, exact under sharing.

    Attributes:
        num_available: Blocks.
        num_held: Blocks held by each tenant, by number.
    """

    def __init__(self, memory: KvMemory) -> None:
        self._memory = memory
        self._references: Int32Array | None = None
        self.num_available = memory.pool.num_available
        self.num_held = memory.pool.columns.num_held_by_tenant.copy()

    @property
    def references(self) -> Int32Array:
        """Reference counts as they would be: int32 [num_blocks_max]."""
        if self._references is None:
            return self._memory.pool.columns.ref_counts
        return self._references

    def give_up(self, row: int, num_tail_blocks: int = 0) -> None:
        """Count the blocks of ``row`` that nobody else refers to; 0 stands for all of them."""
        columns = self._memory.pool.columns
        if self._references is None:
            self._references = columns.ref_counts.copy()
        block_ids = self._memory.tables.blocks_of(row)[-num_tail_blocks:]
        self._references[block_ids] -= 1
        spare = block_ids[self._references[block_ids] == 0]
        if self._memory.pool.is_quiet:
            # Else they come free only when the step in flight has finished.
            self.num_available += len(spare)
        for tenant_id in columns.tenant_ids[spare].tolist():
            self.num_held[tenant_id] -= 1


@dataclass(slots=True)
class _Demand:
    """Blocks that what must run lacks, by row."""

    memory: KvMemory
    missing: dict[int, int]
    writers: dict[int, int]

    def drop(self, row: int) -> None:
        """``row`` does not run after all."""
        self.missing.pop(row, None)
        self.writers.pop(row, None)

    def by_tenant(self, forecast: Forecast) -> dict[int, int]:
        """Blocks to allocate for each tenant, copies on write included."""
        num_by_tenant: dict[int, int] = {}
        tenant_ids = self.memory.sequences.tenant_ids
        for row, num_blocks in self.missing.items():
            tenant_id = int(tenant_ids[row])
            num_by_tenant[tenant_id] = num_by_tenant.get(tenant_id, 0) + num_blocks
        num_writers: dict[int, int] = {}
        for row, block_id in self.writers.items():
            num_writers[block_id] = num_writers.get(block_id, 0) + 1
            # The last owner of a block that is not indexed writes in place.
            is_last = num_writers[block_id] == forecast.references[block_id]
            if not is_last or self.memory.pool.index.is_indexed[block_id]:
                tenant_id = int(tenant_ids[row])
                num_by_tenant[tenant_id] = num_by_tenant.get(tenant_id, 0) + 1
        return num_by_tenant


def choose(memory: KvMemory, plan: StepPlan, max_step_tokens: int) -> Choice:
    """Decide what must run, which victims it takes, or why the plan is refused."""
    if plan.builds_on != memory.last_applied_step:
        return Choice(refusal=BUILDS_ON_UNAPPLIED_STEP)
    leaving = _leaving(memory, plan)
    forecast = Forecast(memory)
    for row in leaving:
        forecast.give_up(row)
    choice = Choice()
    decode_rows = memory.sequences.caught_up_rows()
    choice.decode_rows = decode_rows[~np.isin(decode_rows, leaving)] if leaving else decode_rows
    _choose_chunks(memory, plan.must, leaving, choice)
    _choose_victims(memory, plan, leaving, forecast, choice)
    if len(choice.decode_rows) + sum(choice.chunks.values()) > max_step_tokens:
        choice.refusal = choice.refusal or STEP_TOKENS_EXCEEDED
    return choice


def num_uncomputed(memory: KvMemory, row: int) -> int:
    """Known tokens of ``row`` that are not computed."""
    return int(memory.sequences.num_tokens[row] - memory.sequences.num_computed[row])


def rows_of(entries: Entries) -> Iterator[tuple[int, int, int]]:
    """Sequence id, generation and number of tokens of each entry."""
    return zip(entries.sequence_ids, entries.generations, entries.num_tokens, strict=True)


def _leaving(memory: KvMemory, plan: StepPlan) -> list[int]:
    """Rows of sequences that the plan ends, or announces anew after a rebuild."""
    sequences = [memory.sequences.get(sequence_id) for sequence_id in plan.finish]
    for announcement in plan.announce:
        known = memory.sequences.get(announcement.sequence_id)
        if known is not None and known.generation < announcement.generation:
            sequences.append(known)
    rows = (sequence.row for sequence in sequences if sequence is not None)
    return list(dict.fromkeys(row for row in rows if row != NO_ROW))


def _running(
    memory: KvMemory, sequence_id: int, generation: int, leaving: list[int]
) -> Sequence | None:
    """The sequence if it runs on, in this generation."""
    sequence = memory.sequences.get(sequence_id)
    if sequence is None or sequence.generation != generation:
        return None
    return None if sequence.row == NO_ROW or sequence.row in leaving else sequence


def _choose_chunks(memory: KvMemory, must: Entries, leaving: list[int], choice: Choice) -> None:
    for sequence_id, generation, num_tokens in rows_of(must):
        sequence = _running(memory, sequence_id, generation, leaving)
        if sequence is None:
            choice.stale_ids.append(sequence_id)
            continue
        num_left = num_uncomputed(memory, sequence.row)
        if num_left > 1 and num_tokens > 0:
            chunk = choice.chunks.get(sequence.row, 0) + num_tokens
            choice.chunks[sequence.row] = min(chunk, num_left)
        if num_left == 1 or num_tokens > 0:
            choice.named_rows.add(sequence.row)


def _choose_victims(
    memory: KvMemory, plan: StepPlan, leaving: list[int], forecast: Forecast, choice: Choice
) -> None:
    """Take victims in order until the blocks that ``must`` lacks are there."""
    demand = _demand_of(memory, choice)
    choice.has_writers = bool(demand.writers)
    over = _over(memory, demand, forecast)
    num_idle = 0
    if None in over:
        num_idle = num_yieldable(memory, demand.by_tenant(forecast))
        forecast.num_available += num_idle
        over = _over(memory, demand, forecast)
    for tenant_id, num_over in over.items():
        if tenant_id is not None:
            # A ceiling first takes what is merely kept.
            num_own = min(num_over, num_own_yieldable(memory, tenant_id))
            forecast.num_held[tenant_id] -= num_own
            choice.own_yields[tenant_id] = num_own
    if choice.own_yields:
        over = _over(memory, demand, forecast)
    for victim in _live_victims(memory, plan, leaving, choice.stale_ids):
        row = victim.sequence.row
        if not over:
            break
        if None not in over and victim.sequence.tenant_id not in over:
            continue  # Only its own ceiling stops a tenant; what others give up does not help.
        forecast.give_up(row, victim.num_tail_blocks)
        demand.drop(row)
        choice.victims.append(victim)
        over = _over(memory, demand, forecast)
    if None in over:
        num_pinned = num_yieldable(memory, demand.by_tenant(forecast), with_handles=True)
        forecast.num_available += num_pinned - num_idle
        over = _over(memory, demand, forecast)
    if over:
        choice.refusal = MUST_DOES_NOT_FIT
        return
    gone = [victim.sequence.row for victim in choice.victims]
    if gone:
        choice.decode_rows = choice.decode_rows[~np.isin(choice.decode_rows, gone)]
        choice.named_rows.difference_update(gone)
        for row in gone:
            choice.chunks.pop(row, None)


def _demand_of(memory: KvMemory, choice: Choice) -> _Demand:
    sequences, tables = memory.sequences, memory.tables
    crossing = tables.rows_at_boundary(choice.decode_rows, sequences.num_computed)
    missing = dict.fromkeys(crossing.tolist(), 1)
    writers = rows_to_copy(memory, choice.decode_rows).tolist()
    if choice.chunks:
        chunk_rows: Int32Array = np.array(list(choice.chunks), dtype=np.int32)
        writers += rows_to_copy(memory, chunk_rows).tolist()
        for row, num_tokens in choice.chunks.items():
            missing[row] = tables.num_missing(row, int(sequences.num_computed[row]) + num_tokens)
    block_size = memory.options.block_size
    return _Demand(
        memory,
        missing,
        {
            row: int(tables.entries[row, int(sequences.num_computed[row]) // block_size])
            for row in writers
        },
    )


def _over(memory: KvMemory, demand: _Demand, forecast: Forecast) -> dict[int | None, int]:
    """What ``demand`` would pass, and by how many blocks.

    None stands for the pool, a tenant's number for its ceiling.
    """
    needs = demand.by_tenant(forecast)
    num_left = forecast.num_available - sum(needs.values())
    over: dict[int | None, int] = {}
    tenants = memory.pool.tenants
    for quota in memory.quotas:
        tenant_id = tenants.id_of(quota.tenant)
        held = forecast.num_held[tenant_id] if tenant_id < len(forecast.num_held) else 0
        held += needs.get(tenant_id, 0)
        num_left -= max(0, quota.floor_blocks - held)
        ceiling = quota.ceiling_blocks
        if needs.get(tenant_id) and ceiling is not None and held > ceiling:
            over[tenant_id] = held - ceiling
    if num_left < 0 and needs:
        over[None] = -num_left
    return over


def _live_victims(
    memory: KvMemory, plan: StepPlan, leaving: list[int], stale_ids: list[int]
) -> list[Victim]:
    victims: dict[int, Victim] = {}
    columns = plan.victims
    for sequence_id, generation, recovery, num_blocks in zip(
        columns.sequence_ids,
        columns.generations,
        columns.recoveries,
        columns.num_blocks,
        strict=True,
    ):
        sequence = _running(memory, sequence_id, generation, leaving)
        if sequence is None:
            stale_ids.append(sequence_id)
            continue
        num_tail = num_blocks if recovery is Recovery.TAIL else 0
        if num_tail >= len(memory.tables.blocks_of(sequence.row)):
            num_tail = 0
        victims.setdefault(sequence_id, Victim(sequence, recovery, num_tail))
    return list(victims.values())
