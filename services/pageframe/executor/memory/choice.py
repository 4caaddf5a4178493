"""What of a plan must run, and who gives way for it: decided on numbers alone.

Nothing is changed here, so a refused plan has changed nothing. Victims are taken in order: those
that the plan is certain of, then others only until what must run fits into the pool and into every
tenant's quota; under sharing, that needs the reference counts as they would be, which ``Forecast``
keeps.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from pageframe.core.plan import Entries, Recovery, StepPlan
from pageframe.executor.batch import Int32Array
from pageframe.executor.block_moves import Int64Array
from pageframe.executor.memory.branching import Family, find_families
from pageframe.executor.memory.giving_up import whole_depths
from pageframe.executor.memory.kv_memory import KvMemory
from pageframe.executor.memory.sequence_table import NO_ROW, Sequence
from pageframe.executor.memory.sharing import entries_to_copy
from pageframe.executor.memory.yielding import num_own_yieldable, num_yieldable_by_tenant

BUILDS_ON_UNAPPLIED_STEP = "BUILDS_ON_UNAPPLIED_STEP"
MUST_DOES_NOT_FIT = "MUST_DOES_NOT_FIT"
STEP_TOKENS_EXCEEDED = "STEP_TOKENS_EXCEEDED"
ROWS_EXCEEDED = "ROWS_EXCEEDED"

_NO_ROWS: Int64Array = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Victim:
    """A running sequence that gives way; ``is_certain`` if it does whatever fits."""

    sequence: Sequence
    recovery: Recovery
    num_tail_blocks: int
    is_certain: bool


@dataclass(slots=True, kw_only=True)
class Choice:
    """What must run and who must go for it.

    ``families``: who branches, by the rows of their parents.
    ``has_writers``: whether anybody would write into a block that is not its own. ``own_yields``:
    blocks that idle sessions of a tenant give up for what the tenant runs, by tenant number.
    """

    refusal: str = ""
    decode_rows: Int64Array = field(default_factory=lambda: _NO_ROWS)
    has_writers: bool = False
    chunks: dict[int, int] = field(default_factory=dict)
    named_rows: set[int] = field(default_factory=set)
    families: dict[int, Family] = field(default_factory=dict)
    victims: list[Victim] = field(default_factory=list)
    own_yields: dict[int, int] = field(default_factory=dict)
    stale_ids: list[int] = field(default_factory=list)


class Forecast:
    """What would be available if some rows gave up blocks, exact under sharing.

    Attributes:
        num_available: Blocks.
        num_held: Blocks held by each tenant, by number.
        yieldable: Of these, blocks that pins would leave to others, by tenant number; empty for
            none.
    """

    def __init__(self, memory: KvMemory) -> None:
        self._memory = memory
        self._references: Int32Array | None = None
        self._num_more: dict[int, int] = {}
        self.num_available = memory.pool.num_available
        self.num_held = memory.pool.columns.num_held_by_tenant.copy()
        self.yieldable: list[int] = []

    @property
    def references(self) -> Int32Array:
        """Reference counts as they would be: int32 [num_blocks_max]."""
        if self._references is None:
            return self._memory.pool.columns.ref_counts
        return self._references

    def give_up(self, row: int, num_tail_blocks: int = 0) -> None:
        """Count the blocks of ``row`` that nobody else refers to; 0 stands for all of them."""
        columns = self._memory.pool.columns
        # One that branches gives up what its children would refer to.
        num_references = 1 + self._num_more.pop(row, 0)
        block_ids = self._refer(row, -num_references, num_tail_blocks)
        assert self._references is not None, "references are counted from here on"
        spare = block_ids[self._references[block_ids] == 0]
        if self._memory.pool.is_quiet:
            # Else they come free only when the step in flight has finished.
            self.num_available += len(spare)
        for tenant_id in columns.tenant_ids[spare].tolist():
            self.num_held[tenant_id] -= 1

    def yield_own(self, tenant_id: int, num_blocks: int) -> None:
        """Count blocks of a tenant that its chats leave to it."""
        self.num_held[tenant_id] -= num_blocks
        self.num_available += num_blocks
        if self.yieldable:
            self.yieldable[tenant_id] -= num_blocks

    def branch(self, row: int, num_more: int) -> None:
        """Count so many more references to every block of ``row``."""
        self._num_more[row] = num_more
        self._refer(row, num_more)

    def _refer(self, row: int, change: int, num_tail_blocks: int = 0) -> Int32Array:
        if self._references is None:
            self._references = self._memory.pool.columns.ref_counts.copy()
        block_ids = self._memory.tables.blocks_of(row)[-num_tail_blocks:]
        self._references[block_ids] += change
        return block_ids


@dataclass(slots=True)
class _Demand:
    """Blocks that what must run lacks, by row."""

    memory: KvMemory
    missing: dict[int, int]
    writers: dict[int, list[int]]

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
        written = [(row, block_id) for row, ids in self.writers.items() for block_id in ids]
        for row, block_id in written:
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
    choice.families, choice.stale_ids = find_families(memory, plan.branches, leaving)
    for row, family in choice.families.items():
        forecast.branch(row, family.num_more)
    decode_rows = memory.sequences.caught_up_rows()
    choice.decode_rows = decode_rows[~np.isin(decode_rows, leaving)] if leaving else decode_rows
    _choose_chunks(memory, plan.must, leaving, choice)
    _choose_victims(memory, plan, leaving, forecast, choice)
    num_branches = sum(len(family.token_ids) for family in choice.families.values())
    num_tokens = len(choice.decode_rows) + num_branches + sum(choice.chunks.values())
    if num_tokens > max_step_tokens:
        choice.refusal = choice.refusal or STEP_TOKENS_EXCEEDED
    num_rows_left = memory.sequences.num_empty_rows + len(leaving)
    if num_branches - len(choice.families) > num_rows_left:
        choice.refusal = choice.refusal or ROWS_EXCEEDED
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
        is_decode = num_left == 1 and not sequence.is_steered
        if num_left > 0 and num_tokens > 0 and not is_decode:
            chunk = choice.chunks.get(sequence.row, 0) + num_tokens
            choice.chunks[sequence.row] = min(chunk, num_left)
        if is_decode or num_tokens > 0:
            choice.named_rows.add(sequence.row)


def _choose_victims(
    memory: KvMemory, plan: StepPlan, leaving: list[int], forecast: Forecast, choice: Choice
) -> None:
    """Take victims in order until the blocks that ``must`` lacks are there."""
    demand = _demand_of(memory, choice)
    choice.has_writers = bool(demand.writers)
    over = _over(memory, demand, forecast)
    if None in over:
        forecast.yieldable = num_yieldable_by_tenant(memory, with_handles=False)
        over = _over(memory, demand, forecast)
    for tenant_id, num_over in over.items():
        if tenant_id is not None:
            # A ceiling first takes what is merely kept.
            num_own = min(num_over, num_own_yieldable(memory, tenant_id))
            forecast.yield_own(tenant_id, num_own)
            choice.own_yields[tenant_id] = num_own
    if choice.own_yields:
        over = _over(memory, demand, forecast)
    for victim in _live_victims(memory, plan, leaving, choice.stale_ids):
        row = victim.sequence.row
        if not (over or victim.is_certain):
            break
        is_of_use = victim.is_certain or None in over or victim.sequence.tenant_id in over
        if not is_of_use:
            continue  # Only its own ceiling stops a tenant; what others give up does not help.
        forecast.give_up(row, victim.num_tail_blocks)
        demand.drop(row)
        choice.victims.append(victim)
        over = _over(memory, demand, forecast)
    if None in over:
        forecast.yieldable = num_yieldable_by_tenant(memory, with_handles=True)
        for tenant_id, num_own in choice.own_yields.items():
            forecast.yieldable[tenant_id] -= num_own
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
            choice.families.pop(row, None)


def _demand_of(memory: KvMemory, choice: Choice) -> _Demand:
    sequences, tables = memory.sequences, memory.tables
    crossing = tables.rows_at_boundary(choice.decode_rows, sequences.num_computed)
    missing = dict.fromkeys(crossing.tolist(), tables.num_groups)
    writers: dict[int, list[int]] = {}
    _add_writers(memory, choice.decode_rows, writers)
    if choice.chunks:
        _add_writers(memory, np.array(list(choice.chunks), dtype=np.int32), writers)
        for row, num_tokens in choice.chunks.items():
            missing[row] = tables.num_missing(row, int(sequences.num_computed[row]) + num_tokens)
    for row, family in choice.families.items():
        _add_family(memory, row, len(family.token_ids), missing, writers)
    return _Demand(memory, missing, writers)


def _add_family(
    memory: KvMemory,
    row: int,
    num_branches: int,
    missing: dict[int, int],
    writers: dict[int, list[int]],
) -> None:
    """Each branch writes its token behind what all of them share."""
    tables, num_computed = memory.tables, int(memory.sequences.num_computed[row])
    missing[row] = num_branches * tables.num_missing(row, num_computed + 1)
    if not missing[row]:
        block_ids = tables.blocks_of(row)[-tables.num_groups :].tolist()
        writers[row] = num_branches * block_ids


def _add_writers(memory: KvMemory, rows: Int64Array, writers: dict[int, list[int]]) -> None:
    """Add blocks that are not theirs alone, into which ``rows`` would write, by row."""
    at, columns = entries_to_copy(memory, rows)
    block_ids = memory.tables.entries[at, columns]
    for row, block_id in zip(at.tolist(), block_ids.tolist(), strict=True):
        writers.setdefault(row, []).append(block_id)


def _over(memory: KvMemory, demand: _Demand, forecast: Forecast) -> dict[int | None, int]:
    """What ``demand`` would pass, and by how many blocks.

    None stands for the pool, a tenant's number for its ceiling.
    """
    needs = demand.by_tenant(forecast)
    num_left = forecast.num_available - sum(needs.values())
    if forecast.yieldable:
        num_left += sum(forecast.yieldable)
        num_left -= memory.num_protected(forecast.yieldable, needs, forecast.num_held)
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
    for number, (sequence_id, generation, recovery, num_blocks) in enumerate(
        zip(
            columns.sequence_ids,
            columns.generations,
            columns.recoveries,
            columns.num_blocks,
            strict=True,
        )
    ):
        sequence = _running(memory, sequence_id, generation, leaving)
        if sequence is None:
            stale_ids.append(sequence_id)
            continue
        num_tail = whole_depths(memory, num_blocks) if recovery is Recovery.TAIL else 0
        if num_tail >= memory.tables.num_held(sequence.row):
            num_tail = 0
        is_certain = number < columns.num_certain
        victims.setdefault(sequence_id, Victim(sequence, recovery, num_tail, is_certain))
    return list(victims.values())
