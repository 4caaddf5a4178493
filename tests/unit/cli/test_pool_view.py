"""The pool as a person sees it: every block in the map, nobody's name who is not to be named."""

import io

import numpy as np
import pytest
from rich.console import Console

from pageframe.cli.pool_tally import Rates, Tally
from pageframe.cli.pool_view import (
    KINDS,
    explanation_lines,
    format_age,
    kinds_of,
    map_cells,
    operation_line,
    render_pool,
)
from pageframe.core.replica import PoolAccount, TenantQuota
from pageframe.core.trace import KvCause, KvOperation
from pageframe.wire.memory_facts import (
    BlockExplanation,
    HostFacts,
    MemorySnapshot,
    OperationBatch,
    OperationRecord,
    Retention,
    RetentionKind,
    SequenceFacts,
    TableFacts,
    TenantUsage,
)

FREE, HELD, CACHED, FENCED, QUARANTINED = range(5)
NOW_NS = 1_000 * 10**9


def snapshot(states, ref_counts=None, pin_counts=None, **fields):
    num_blocks = len(states)
    return MemorySnapshot(
        step=7,
        operation=41,
        block_size=4,
        account=PoolAccount(total=num_blocks),
        states=np.array(states, dtype=np.uint8),
        ref_counts=np.array(ref_counts or [0] * num_blocks, dtype=np.int32),
        pin_counts=np.array(pin_counts or [0] * num_blocks, dtype=np.int32),
        is_indexed=np.zeros(num_blocks, dtype=np.bool_),
        **fields,
    )


def table(sequence_id, block_ids, tenant="red"):
    return TableFacts(
        sequence_id=sequence_id,
        request_id=f"r{sequence_id}" if sequence_id else "",
        tenant=tenant,
        block_ids=block_ids,
        num_computed=4 * len(block_ids),
        state=2,
        since_ns=NOW_NS - 3 * 10**9 if sequence_id else 0,
    )


def drawn(view, width=60):
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    console.print(view)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def names(kinds):
    return [KINDS[number].name for number in kinds]


def test_every_state_has_its_kind_and_pinned_goes_before_shared():
    taken = snapshot(
        [FREE, HELD, HELD, HELD, CACHED, FENCED, QUARANTINED],
        ref_counts=[0, 1, 2, 2, 0, 0, 0],
        pin_counts=[0, 0, 0, 1, 0, 0, 0],
    )
    expected = ["free", "held", "shared", "pinned", "cached", "fenced", "quarantined"]
    assert names(kinds_of(taken)) == expected
    assert len({kind.sign for kind in KINDS}) == len(KINDS)


def test_a_map_with_room_has_a_cell_for_each_block():
    kinds = kinds_of(snapshot([FREE, HELD, CACHED]))
    cells, num_per_cell = map_cells(kinds, 3)
    assert (names(cells), num_per_cell) == (["free", "held", "cached"], 1)


def test_a_cell_of_many_blocks_shows_what_most_of_them_are():
    cells_in_row = ([FREE, FREE, HELD], [CACHED, FREE, CACHED], [FREE, CACHED, HELD], [HELD])
    kinds = kinds_of(snapshot([state for cell in cells_in_row for state in cell]))
    cells, num_per_cell = map_cells(kinds, 4)
    assert num_per_cell == 3
    # Of three different ones the cell shows the one that stands first in the bar.
    assert names(cells) == ["free", "cached", "held", "held"]


@pytest.mark.parametrize("num_blocks", [1, 2, 479, 480, 481, 1000, 100_000])
def test_a_map_of_any_pool_fits(num_blocks):
    cells, num_per_cell = map_cells(np.zeros(num_blocks, dtype=np.uint8), 480)
    assert 1 <= len(cells) <= 480
    assert (len(cells) - 1) * num_per_cell < num_blocks <= len(cells) * num_per_cell


def test_the_view_names_counts_holders_tenants_and_what_is_kept():
    taken = snapshot(
        [HELD, HELD, HELD, CACHED, FREE, FREE],
        ref_counts=[2, 1, 1, 0, 0, 0],
        tables=[table(1, [0, 1]), table(2, [0]), table(0, [2], tenant="")],
        quotas=[
            TenantUsage(
                quota=TenantQuota(tenant="red", floor_blocks=2, ceiling_blocks=5),
                num_blocks_held=2,
            ),
            TenantUsage(quota=TenantQuota(tenant="blue"), num_blocks_held=0),
        ],
        retentions=[
            Retention(
                name="chat-9",
                kind=RetentionKind.SESSION,
                tenant="red",
                num_blocks_pinned=3,
                expire_ns=NOW_NS + 60 * 10**9,
            )
        ],
        host=HostFacts(num_slots=100, num_used=20, num_held=5),
    )
    rates = Rates(
        total=15.0, by_operation={KvOperation.ALLOCATE: 10.0, KvOperation.FREE: 5.0}, num_lost=3
    )
    view = render_pool(taken, now_ns=NOW_NS, width=60, rates=rates, note="mind the gap")
    lines = drawn(view, width=120)
    assert lines[0] == "6 blocks of 4 tokens  step 7  operation 41  15 operations/s"
    assert lines[1] == "mind the gap"
    assert lines[2] == "▓" * 10 + "█" * 20 + "░" * 10 + "·" * 20
    text = "\n".join(lines)
    assert "· free 2  ░ cached 1  █ held 2  ▓ shared 1" in text
    assert "each cell is one block\n▓██░··\n" in text
    rows = [line.split() for line in lines]
    assert ["r1", "red", "1", "2", "1", "8", "running", "3.0", "s"] in rows
    assert ["r2", "red", "2", "1", "1", "4", "running", "3.0", "s"] in rows
    assert "(another tenant)" in text
    assert ["red", "2", "2", "5"] in rows
    assert ["blue", "0", "0", "none"] in rows
    assert ["chat-9", "red", "session", "3", "in", "60", "s"] in rows
    assert "host tier: 20 of 100 slots in use, 5 of them held" in text
    assert "allocate 10/s, free 5/s  (3 not seen)" in text


def test_many_holders_are_cut_and_the_largest_stay():
    tables = [table(number, list(range(number))) for number in range(1, 31)]
    lines = drawn(
        render_pool(snapshot([HELD] * 30, [1] * 30, tables=tables), now_ns=NOW_NS, width=80), 80
    )
    shown = [line.split()[2] for line in lines if " red " in line]
    assert shown == [str(number) for number in range(30, 20, -1)]
    assert "and 20 more" in lines


def test_the_bar_shows_the_few_beside_the_many():
    states = [HELD] * 9_998 + [QUARANTINED, CACHED]
    lines = drawn(render_pool(snapshot(states, [1] * 10_000), now_ns=NOW_NS, width=20), 120)
    assert lines[1] == "x" + "█" * 18 + "░"


def test_an_empty_pool_can_be_drawn():
    assert drawn(render_pool(snapshot([]), now_ns=NOW_NS, width=20), 20)


def test_a_block_is_explained_in_sentences():
    block = BlockExplanation(
        block_id=5,
        state=HELD,
        num_references=3,
        num_pins=1,
        is_indexed=True,
        tenant="red",
        sequence_ids=[1, 2],
        retentions=[
            Retention(
                name="abc",
                kind=RetentionKind.HANDLE,
                tenant="red",
                num_blocks_pinned=2,
                expire_ns=NOW_NS - 1,
            )
        ],
        operation=KvOperation.COPY_ON_WRITE,
        operation_number=41,
        cause=KvCause.FORK,
        step=6,
        time_ns=NOW_NS - 90 * 10**9,
    )
    assert list(explanation_lines(block, NOW_NS)) == [
        "block 5 is held: 3 references, 1 of them pins; in the prefix index",
        "charged to tenant red",
        "in the block table of sequence 1, 2",
        "kept by handle abc of tenant red, now",
        "last operation 41: kv.copy_on_write, cause fork, step 6, 90 s ago",
    ]
    nothing = BlockExplanation(block_id=5, state=FREE, num_references=0)
    assert list(explanation_lines(nothing, NOW_NS)) == [
        "block 5 is free: 0 references; not in the prefix index"
    ]


def test_an_operation_is_a_line():
    record = OperationRecord(8, KvOperation.MOVE, KvCause.RESIZE, 0, 0, [1, 2], [3, 4])
    assert operation_line(record) == "8 kv.move (resize) step 0: 1 2 -> 3 4"
    record = OperationRecord(9, KvOperation.FREE, KvCause.FINISHED, 7, 2, [1])
    assert operation_line(record) == "9 kv.free (finished) step 2 sequence 7: 1"
    whose = SequenceFacts(7, "chat-3", "red", 1)
    assert operation_line(record, whose) == (
        "9 kv.free (finished) step 2 sequence 7 (chat-3 of red): 1"
    )


@pytest.mark.parametrize(
    ("age_s", "text"),
    [
        (-5, "0.0 s"),
        (9.94, "9.9 s"),
        (99, "99 s"),
        (100, "2 min"),
        (5999, "100 min"),
        (6000, "1.7 h"),
    ],
)
def test_ages_are_rounded_for_people(age_s, text):
    assert format_age(int(age_s * 10**9)) == text


def test_a_tally_counts_the_last_five_seconds():
    now_s = 100.0
    tally = Tally(lambda: now_s)

    def add(operation, count, num_lost=0):
        record = OperationRecord(1, operation, KvCause.DECODE, 0, 0, [1])
        tally.add(OperationBatch([record] * count, num_lost))

    now_s = 102.0
    add(KvOperation.ALLOCATE, 6, num_lost=4)
    add(KvOperation.FREE, 2)
    rates = tally.rates()
    assert (rates.total, rates.num_lost) == (4.0, 4)
    assert list(rates.by_operation.items()) == [
        (KvOperation.ALLOCATE, 3.0),
        (KvOperation.FREE, 1.0),
    ]
    now_s = 106.0
    add(KvOperation.FREE, 3)
    assert tally.rates().by_operation == {
        KvOperation.ALLOCATE: 1.2,
        KvOperation.FREE: 1.0,
    }
    now_s = 108.0
    assert tally.rates().by_operation == {KvOperation.FREE: 0.6}
    now_s = 200.0
    assert tally.rates() == Rates(num_lost=4)
