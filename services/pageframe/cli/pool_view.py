"""The block pool as a person sees it: counts, a map, who holds what, and what happens.

    ██████████████▓▓▓▓░░░░░░·········  bar: the pool by state, in the order of the legend
    █ held  ▓ shared  ◆ pinned  ░ cached  ▒ fenced  x quarantined  · free

Each state has a sign of its own as well as a colour, so that the map can be read without colours.
"""

import itertools
from collections.abc import Iterable
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pageframe.cli.pool_tally import Rates
from pageframe.wire.kv_memory import CAUSE_NAMES
from pageframe.wire.memory_facts import (
    BLOCK_STATE_NAMES,
    SEQUENCE_STATE_NAMES,
    BlockExplanation,
    MemorySnapshot,
    OperationRecord,
    Retention,
    SequenceFacts,
)

NUM_MAP_ROWS_MAX: Final = 8
NUM_HOLDERS_MAX: Final = 10
_NANOSECONDS_PER_SECOND: Final = 1e9
_ANOTHER_TENANT: Final = "(another tenant)"


class Kind(NamedTuple):
    """How blocks of one kind are shown."""

    name: str
    sign: str
    style: str


# In the order in which they stand in the bar. Where one cell of the map stands for several blocks
# and two kinds are as many, it shows the one that comes first here.
KINDS: Final = (
    Kind("quarantined", "x", "red"),
    Kind("pinned", "◆", "magenta"),
    Kind("shared", "▓", "cyan"),
    Kind("held", "█", "green"),
    Kind("fenced", "▒", "yellow"),
    Kind("cached", "░", "blue"),
    Kind("free", "·", "bright_black"),
)
# The others are named when there are any.
_ALWAYS_NAMED: Final = ("held", "cached", "free")
_NUMBER_OF_KIND: Final = {kind.name: number for number, kind in enumerate(KINDS)}


def render_pool(
    snapshot: MemorySnapshot, *, now_ns: int, width: int, rates: Rates | None = None, note: str = ""
) -> RenderableType:
    """The whole view.

    Args:
        snapshot: The pool.
        now_ns: The time, nanoseconds since the Unix epoch, for ages.
        width: Columns there are.
        rates: Operations per second, where they are measured.
        note: A line below the title, where there is something to say.
    """
    kinds = kinds_of(snapshot)
    parts: list[RenderableType] = [_title(snapshot, rates)]
    if note:
        parts.append(Text(note, style="yellow"))
    parts += [_bar(kinds, width), _legend(kinds), Text(), *_map(kinds, width)]
    parts += _sections(snapshot, now_ns)
    if rates is not None and rates.by_operation:
        parts += [Text(), _rates_line(rates)]
    return Group(*parts)


def kinds_of(snapshot: MemorySnapshot) -> NDArray[np.uint8]:
    """Index into ``KINDS`` for each block; of held ones, pinned goes before shared."""
    by_state = np.array([_NUMBER_OF_KIND[name] for name in BLOCK_STATE_NAMES], dtype=np.uint8)
    kinds: NDArray[np.uint8] = by_state[snapshot.states]
    is_held = kinds == _NUMBER_OF_KIND["held"]
    kinds[is_held & (snapshot.ref_counts > 1)] = _NUMBER_OF_KIND["shared"]
    kinds[is_held & (snapshot.pin_counts > 0)] = _NUMBER_OF_KIND["pinned"]
    return kinds


def map_cells(kinds: NDArray[np.uint8], num_cells_max: int) -> tuple[NDArray[np.int64], int]:
    """The map: the kind that each cell shows, and how many blocks a cell stands for."""
    num_per_cell = max(1, -(-len(kinds) // num_cells_max))
    num_cells = -(-len(kinds) // num_per_cell)
    padded = np.full(num_cells * num_per_cell, len(KINDS), dtype=np.uint8)
    padded[: len(kinds)] = kinds
    cells = padded.reshape(num_cells, num_per_cell)
    counts = np.stack([(cells == number).sum(axis=1) for number in range(len(KINDS))], axis=1)
    return counts.argmax(axis=1), num_per_cell


def explanation_lines(block: BlockExplanation, now_ns: int) -> Iterable[str]:
    """What is known of one block, in sentences."""
    pins = f", {block.num_pins} of them pins" if block.num_pins else ""
    indexed = "in" if block.is_indexed else "not in"
    yield (
        f"block {block.block_id} is {BLOCK_STATE_NAMES[block.state]}: "
        f"{_count(block.num_references, 'reference')}{pins}; {indexed} the prefix index"
    )
    if block.kv_group:
        yield f"holds layers of group {block.kv_group}"
    if block.tenant:
        yield f"charged to tenant {block.tenant}"
    if block.sequence_ids:
        yield f"in the block table of sequence {', '.join(map(str, block.sequence_ids))}"
    for retention in block.retentions:
        yield (
            f"kept by {retention.kind.name.lower()} {retention.name} of tenant "
            f"{retention.tenant}, {_remaining(retention.expire_ns, now_ns)}"
        )
    if block.operation is not None and block.cause is not None:
        yield (
            f"last operation {block.operation_number}: {block.operation.span_name}, cause "
            f"{CAUSE_NAMES[block.cause]}, step {block.step}, "
            f"{format_age(now_ns - block.time_ns)} ago"
        )


def operation_line(record: OperationRecord, whose: SequenceFacts | None = None) -> str:
    """One operation; ``whose`` its sequence is, where that is known."""
    blocks = " ".join(map(str, record.block_ids))
    targets = " ".join(map(str, record.target_ids))
    arrow = f" -> {targets}" if targets else ""
    who = f" sequence {record.sequence_id}" if record.sequence_id else ""
    if whose is not None:
        who += f" ({whose.request_id} of {whose.tenant})"
    return (
        f"{record.number} {record.operation.span_name} ({CAUSE_NAMES[record.cause]}) "
        f"step {record.step}{who}: {blocks}{arrow}"
    )


def format_age(age_ns: int) -> str:
    """For people: ``"0.3 s"``, ``"45 s"``, ``"3 min"``, ``"2.5 h"``."""
    age_s = max(0, age_ns) / _NANOSECONDS_PER_SECOND
    if age_s < 10:
        return f"{age_s:.1f} s"
    if age_s < 100:
        return f"{age_s:.0f} s"
    return f"{age_s / 60:.0f} min" if age_s < 6000 else f"{age_s / 3600:.1f} h"


def _title(snapshot: MemorySnapshot, rates: Rates | None) -> Text:
    speed = "" if rates is None else f"  {rates.total:,.0f} operations/s"
    return Text(
        f"{snapshot.account.total:,} blocks of {snapshot.block_size} tokens  "
        f"step {snapshot.step:,}  operation {snapshot.operation:,}{speed}",
        style="bold",
    )


def _bar(kinds: NDArray[np.uint8], width: int) -> Text:
    """Kinds in their order, each as long as its share; what is there at all gets a cell."""
    counts = np.bincount(kinds, minlength=len(KINDS))
    bar, num_blocks, num_cells = Text(), 0, 0
    for kind, count in zip(KINDS, counts.tolist(), strict=True):
        num_blocks += count
        num_cells_least = num_cells + bool(count)
        end = min(width, max(num_cells_least, num_blocks * width // max(1, len(kinds))))
        bar.append(kind.sign * (end - num_cells), style=kind.style)
        num_cells = end
    return bar


def _legend(kinds: NDArray[np.uint8]) -> Text:
    counts = np.bincount(kinds, minlength=len(KINDS)).tolist()
    legend = Text()
    for kind, count in reversed(list(zip(KINDS, counts, strict=True))):
        if count or kind.name in _ALWAYS_NAMED:
            legend.append(f"{kind.sign} ", style=kind.style)
            legend.append(f"{kind.name} {count:,}  ")
    return legend


def _map(kinds: NDArray[np.uint8], width: int) -> Iterable[Text]:
    cells, num_per_cell = map_cells(kinds, width * NUM_MAP_ROWS_MAX)
    what = "one block" if num_per_cell == 1 else f"{num_per_cell} blocks, shown by most of them"
    yield Text(f"each cell is {what}", style="dim")
    for start in range(0, len(cells), width):
        row = Text()
        # A run of equal cells has one change of colour, not one for each.
        for number, run in itertools.groupby(cells[start : start + width].tolist()):
            row.append(KINDS[number].sign * len(list(run)), style=KINDS[number].style)
        yield row


def _sections(snapshot: MemorySnapshot, now_ns: int) -> Iterable[RenderableType]:
    if snapshot.tables:
        yield Text()
        yield _holders(snapshot, now_ns)
    if snapshot.quotas:
        yield Text()
        yield _tenants(snapshot)
    if snapshot.retentions:
        yield Text()
        yield _retentions(snapshot.retentions, now_ns)
    if host := snapshot.host.num_slots:
        yield Text()
        yield Text(
            f"host tier: {snapshot.host.num_used:,} of {host:,} slots in use, "
            f"{snapshot.host.num_held:,} of them held for swapped-out sequences and sessions"
        )


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index, column in enumerate(columns):
        is_name = index < 2
        table.add_column(column, justify="left" if is_name else "right", no_wrap=True)
    return table


def _holders(snapshot: MemorySnapshot, now_ns: int) -> Table:
    """Sequences that hold most blocks; ``shared`` counts those that others refer to as well."""
    table = _table("request", "tenant", "sequence", "blocks", "shared", "tokens", "state", "since")
    by_size = sorted(snapshot.tables, key=lambda it: len(it.block_ids), reverse=True)
    for facts in by_size[:NUM_HOLDERS_MAX]:
        block_ids = np.array(facts.block_ids, dtype=np.int64)
        num_shared = int((snapshot.ref_counts[block_ids] > 1).sum())
        table.add_row(
            facts.request_id or (_ANOTHER_TENANT if not facts.sequence_id else ""),
            facts.tenant,
            str(facts.sequence_id or ""),
            f"{len(block_ids):,}",
            f"{num_shared:,}",
            f"{facts.num_computed:,}",
            SEQUENCE_STATE_NAMES[facts.state],
            format_age(now_ns - facts.since_ns) if facts.since_ns else "",
        )
    num_more = len(by_size) - NUM_HOLDERS_MAX
    if num_more > 0:
        table.add_row(f"and {num_more:,} more")
    return table


def _tenants(snapshot: MemorySnapshot) -> Table:
    table = _table("tenant", "", "held", "floor", "ceiling")
    for usage in snapshot.quotas:
        ceiling = usage.quota.ceiling_blocks
        table.add_row(
            usage.quota.tenant,
            "",
            f"{usage.num_blocks_held:,}",
            f"{usage.quota.floor_blocks:,}",
            "none" if ceiling is None else f"{ceiling:,}",
        )
    return table


def _retentions(retentions: list[Retention], now_ns: int) -> Table:
    table = _table("kept", "tenant", "by", "blocks", "ends")
    for retention in retentions[:NUM_HOLDERS_MAX]:
        table.add_row(
            retention.name or _ANOTHER_TENANT,
            retention.tenant,
            retention.kind.name.lower(),
            f"{retention.num_blocks_pinned:,}",
            _remaining(retention.expire_ns, now_ns),
        )
    if len(retentions) > NUM_HOLDERS_MAX:
        table.add_row(f"and {len(retentions) - NUM_HOLDERS_MAX:,} more")
    return table


def _rates_line(rates: Rates) -> Text:
    parts = [
        f"{operation.span_name.removeprefix('kv.')} {rate:,.0f}/s"
        for operation, rate in rates.by_operation.items()
    ]
    lost = f"  ({rates.num_lost:,} not seen)" if rates.num_lost else ""
    return Text(", ".join(parts) + lost, style="dim")


def _remaining(expire_ns: int, now_ns: int) -> str:
    return f"in {format_age(expire_ns - now_ns)}" if expire_ns > now_ns else "now"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
