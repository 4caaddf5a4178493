"""Two groups of layers, one that sees everything and one with a window: two tables in one."""

import numpy as np
import pytest

from pageframe.core.clock import ManualClock
from pageframe.core.errors import PreconditionError
from pageframe.core.plan import Announcement, Recovery
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import RefusedBecause
from pageframe.core.trace import KvCause
from pageframe.executor.batch_builder import BatchBuilder
from pageframe.executor.desk import MemoryDesk
from pageframe.executor.memory.block_keys import chain_root
from pageframe.executor.memory.block_table import BlockTables
from pageframe.executor.memory.giving_up import leave_window, preempt
from pageframe.executor.memory.matching import Match
from pageframe.executor.memory.options import MemoryOptions
from pageframe.executor.memory.purpose import Purpose
from pageframe.executor.memory.resizing import check_resize
from pageframe.executor.memory.retaining import num_kept_tokens, retain
from pageframe.executor.memory.yielding import build_memory
from pageframe.executor.model.layer_groups import group_layers
from unit.executor.small_engine import fork
from unit.memory.kv_records import RecordingSink
from unit.memory.memories import Harness, entries, victims

TEN = list(range(10, 20))
TWELVE = list(range(10, 22))
PRESSURE = Purpose(KvCause.POOL_PRESSURE)


def request(sequence_id: int, token_ids: list[int]) -> Announcement:
    return Announcement(
        sequence_id=sequence_id,
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        sampling=SamplingParams(max_tokens=20),
    )


class Grouped(Harness):
    """Blocks of 4 tokens; group 0 sees everything, group 1 six positions."""

    def __init__(self, *, group_windows: tuple[int, ...] = (0, 6), **options) -> None:
        super().__init__(
            **{"num_blocks": 24, "has_prefix_cache": True} | options, group_windows=group_windows
        )

    def start(self, sequence_id: int, token_ids: list[int]) -> None:
        self.run(announce=[request(sequence_id, token_ids)], may=entries((sequence_id, 0, 64)))

    def cache(self, token_ids: list[int]) -> None:
        """Compute a prompt and let it end."""
        self.start(900, token_ids)
        self.run(finish=[900])
        self.sink.records.clear()

    def table(self, sequence_id: int) -> tuple[list[int], list[int]]:
        """Entries that are valid, and the blocks there."""
        row, tables = self.row(sequence_id), self.memory.tables
        return tables.columns_of(row).tolist(), tables.blocks_of(row).tolist()

    def match(self, token_ids: list[int]) -> Match:
        """What a newcomer would find; it is not let in."""
        sequence = self.memory.announce(request(800, token_ids))
        found = self.memory.match(sequence)
        self.memory.forget(sequence, KvCause.FINISHED)
        return found

    def preempt(self, recovery: Recovery, num_tail_blocks: int = 0) -> tuple[Recovery, int, int]:
        return preempt(self.memory, self.memory.sequences.by_id(1), recovery, num_tail_blocks)


def test_groups_take_turns_in_one_table_and_a_window_lets_go_of_its_own_blocks():
    house = Grouped()
    house.start(1, TEN)
    # Logical blocks 0, 1 and 2; of group 1 the next token, at 10, sees [5, 10].
    assert house.sink.brief() == [
        ("ALLOCATE", "PREFILL", (0, 1, 2, 3, 4, 5)),
        ("INDEX", "SEALED", (0, 2)),
        ("INDEX", "SEALED", (1, 3)),
        ("RELEASE", "WINDOW", (1,)),
    ]
    assert house.table(1) == ([0, 2, 3, 4, 5], [0, 2, 3, 4, 5])
    assert house.memory.tables.first_blocks[house.row(1)].tolist() == [0, 1]
    assert house.memory.tables.first_block[house.row(1)] == 0
    assert house.memory.account().held == 5


def test_a_decode_into_a_new_block_takes_one_in_each_group():
    house = Grouped()
    house.start(1, TEN)
    for _ in range(2):
        house.run()
    house.sink.records.clear()
    house.run()
    # Position 12 opens logical block 3; behind it positions up to 7 are out of sight.
    assert house.sink.brief() == [
        ("ALLOCATE", "DECODE", (6,)),
        ("ALLOCATE", "DECODE", (7,)),
        ("RELEASE", "WINDOW", (3,)),
    ]
    assert house.table(1) == ([0, 2, 4, 5, 6, 7], [0, 2, 4, 5, 6, 7])


def test_a_fork_shares_the_blocks_of_all_groups_and_each_is_copied_by_who_writes_first():
    house = Grouped()
    house.start(1, TEN)
    house.run(forks=[fork(1, 2)])
    assert house.table(2) == house.table(1)
    house.sink.records.clear()
    house.run()
    # The first to write copies, in both groups; the other keeps what it has alone then.
    assert house.sink.brief()[:4] == [
        ("ALLOCATE", "DECODE", (6,)),
        ("ALLOCATE", "DECODE", (7,)),
        ("COPY_ON_WRITE", "DECODE", (4,)),
        ("RELEASE", "DECODE", (4,)),
    ]
    assert house.table(1) == ([0, 2, 3, 4, 5], [0, 2, 3, 6, 7])
    assert house.table(2) == ([0, 2, 3, 4, 5], [0, 2, 3, 4, 5])
    assert house.memory.sequences.by_id(1).num_copies_on_write == 2
    assert house.memory.pool.columns.ref_counts[:8].tolist() == [2, 0, 2, 2, 1, 1, 1, 1]


def test_what_must_run_needs_copies_in_all_groups():
    """Five blocks are held, one is cached, and two have to be copied for one of the two writers."""
    for num_blocks, refusal in ((6, "MUST_DOES_NOT_FIT"), (7, "")):
        house = Grouped(num_blocks=num_blocks)
        house.start(1, TEN)
        house.run(forks=[fork(1, 2)])
        assert house.memory.pool.num_available == num_blocks - 5
        assert house.apply().result.refusal == refusal


def test_a_victim_gives_way_with_its_blocks_of_all_groups():
    house = Grouped(num_blocks=6)
    house.start(1, TEN)
    house.run(forks=[fork(1, 2)])
    applied = house.run(victims=victims((2, 0)))
    assert applied.result.preempted_ids == [2]
    assert applied.result.preempted_num_blocks == [5]
    assert house.table(1) == ([0, 2, 3, 4, 5], [0, 2, 3, 4, 5])


def test_a_swap_brings_back_what_each_group_still_sees():
    house = Grouped(num_host_slots=16)
    house.start(1, TEN)
    assert house.preempt(Recovery.SWAP) == (Recovery.SWAP, 5, 0)
    assert house.memory.host.num_held == 5
    house.run()
    house.memory.pool.evict(24, PRESSURE)
    house.sink.records.clear()
    applied = house.run(may=entries((1, 1, 64)))
    assert applied.result.refused_because == [RefusedBecause.PROMOTING]
    ((operation, cause, slots),) = [it for it in house.sink.brief() if it[0] == "SWAP_IN"]
    assert (operation, cause, len(slots)) == ("SWAP_IN", "SWAP", 5)
    house.run(may=entries((1, 1, 64)))
    # The last blocks are nobody else's: they are written in place again, in both groups.
    records = house.sink.brief()
    assert [len(blocks) for operation, _, blocks in records if operation == "UNINDEX"] == [2]
    assert "COPY_ON_WRITE" not in {operation for operation, _, _ in records}
    # Ten tokens were there, and the eleventh is computed.
    assert house.memory.sequences.num_computed[house.row(1)] == 11
    columns, _ = house.table(1)
    assert columns == [0, 2, 3, 4, 5]
    assert house.memory.host.num_held == 0


def test_a_tail_is_given_up_in_all_groups_and_only_as_far_as_each_window_reaches_back():
    house = Grouped(group_windows=(0, 8), has_prefix_cache=False)
    house.start(1, TEN[:7])
    # Nothing has left the window yet. One block is asked for; a logical block has two.
    assert house.preempt(Recovery.TAIL, 1) == (Recovery.TAIL, 2, 4)
    assert house.table(1) == ([0, 1], [0, 1])
    assert house.memory.account().free == 22
    house.run(must=entries((1, 1, 64)))
    for _ in range(7):
        house.run()
    # Fifteen are computed, and [8, 15] is seen. To compute 12 again, 5 would have to be seen.
    assert house.table(1)[0] == [0, 2, 4, 5, 6, 7]
    assert house.preempt(Recovery.TAIL, 1) == (Recovery.RECOMPUTE, 6, 0)


class TestMatch:
    def test_the_head_of_a_group_with_a_window_may_be_gone(self):
        house = Grouped()
        house.cache(TWELVE)
        # What left the window is the oldest that is cached.
        assert house.memory.pool.supply.evictable_ids()[0] == 1
        house.memory.pool.evict(1, PRESSURE)
        match = house.match([*TWELVE, 50, 51])
        # The next token stands at 12 and sees [7, 12] in group 1.
        assert (match.num_tokens, match.first_blocks) == (12, [0, 1])
        assert match.block_ids == [0, 2, 3, 4, 5]
        house.sink.records.clear()
        house.start(2, [*TWELVE, 50, 51])
        assert house.sink.brief()[:2] == [
            ("SHARE", "PREFIX_HIT", (0, 2, 3, 4, 5)),
            ("ALLOCATE", "PREFILL", (1, 6)),
        ]
        # Fourteen are computed: of group 1 positions from 9 on are seen.
        assert house.table(2) == ([0, 2, 4, 5, 6, 7], [0, 2, 4, 5, 1, 6])

    def test_one_window_in_all_layers_may_have_lost_its_head_too(self):
        house = Grouped(group_windows=(6,))
        house.cache(TWELVE)
        house.memory.pool.evict(1, PRESSURE)
        match = house.match([*TWELVE, 50])
        assert (match.num_tokens, match.block_ids, match.first_blocks) == (12, [1, 2], [1])

    def test_a_hit_ends_where_no_group_lacks_what_is_read_next(self):
        house = Grouped()
        house.start(1, TWELVE)
        # Of group 1, logical block 2 cannot be found; block 0 has left the window, but can be.
        house.memory.pool.unpublish(np.array([5], dtype=np.int32), PRESSURE)
        match = house.match([*TWELVE, 50])
        assert (match.num_tokens, match.block_ids) == (8, [0, 1, 2, 3])
        house.memory.pool.unpublish(np.array([3], dtype=np.int32), PRESSURE)
        assert house.match([*TWELVE, 50]).block_ids == [0, 1]
        house.memory.pool.evict(1, PRESSURE)
        assert house.match([*TWELVE, 50]) == Match(first_blocks=[0, 0])

    def test_a_hit_is_no_longer_than_the_group_that_sees_everything_has_it(self):
        house = Grouped()
        house.start(1, TWELVE)
        house.memory.pool.unpublish(np.array([2], dtype=np.int32), PRESSURE)
        assert house.match([*TWELVE, 50]).block_ids == [0, 1]

    def test_a_hit_may_end_inside_the_blocks_of_all_groups(self):
        house = Grouped()
        house.cache(TWELVE)
        match = house.match([*TWELVE[:10], 50, 51])
        assert (match.num_tokens, match.block_ids) == (10, [0, 1, 2, 3, 4, 5])

    def test_who_finds_every_token_copies_the_last_block_of_each_group_or_does_without(self):
        house = Grouped()
        house.cache(TWELVE)
        match = house.match(TWELVE)
        assert (match.num_tokens, match.needs_copy(4)) == (11, True)
        match.leave_out_last(4)
        # Without the last one the next token stands at 8 and sees position 3.
        assert (match.num_tokens, match.block_ids) == (8, [0, 1, 2, 3])

    def test_groups_never_find_each_others_blocks(self):
        house = Grouped(group_windows=(0, 0))
        house.cache(TWELVE)
        # The first group has lost everything; the second alone is of no use.
        sequence = house.memory.announce(request(1, [*TWELVE, 50]))
        index = house.memory.pool.index
        keys = [chain.up_to(12, sequence.parked_tokens, 4) for chain in sequence.chains]
        assert [index.block_of(key) for key in keys[0]] == [0, 2, 4]
        assert [index.block_of(key) for key in keys[1]] == [1, 3, 5]


def test_a_prefix_is_kept_as_far_as_who_goes_on_behind_it_reads():
    house = Grouped()
    house.cache(TWELVE)
    kept = retain(
        house.memory, tenant="", cache_salt=b"", name="x", token_ids=TWELVE, expire_ns=100
    )
    assert list(kept.pinned.values()) == [0, 2, 3, 4, 5]
    assert num_kept_tokens(house.memory, kept) == 12
    house.memory.pool.evict(24, PRESSURE)
    assert house.match([*TWELVE, 50]).num_tokens == 12


def test_a_kept_prefix_counts_logical_blocks_of_which_nothing_lacks():
    house = Grouped()
    house.start(1, TWELVE)
    house.memory.pool.unpublish(np.array([5], dtype=np.int32), PRESSURE)
    kept = retain(
        house.memory, tenant="", cache_salt=b"", name="x", token_ids=TWELVE, expire_ns=100
    )
    assert list(kept.pinned.values()) == [0, 2, 3, 4]
    assert num_kept_tokens(house.memory, kept) == 8


def test_the_longest_sequence_needs_its_blocks_in_every_group():
    house = Grouped()
    house.start(1, TEN)
    # Ten tokens and nineteen more are eight logical blocks.
    with pytest.raises(PreconditionError) as caught:
        check_resize(house.memory, 15)
    assert caught.value.reason == "RESIZE_BELOW_RUNNING"
    check_resize(house.memory, 16)


def test_a_batch_has_a_slot_of_each_token_in_each_group():
    house = Grouped()
    builder = BatchBuilder(house.memory.tables, house.memory.sequences, max_step_tokens=32)
    house.start(1, TEN[:6])
    batch = builder.build(house.apply(announce=[request(2, [50, 51])], may=entries((2, 0, 2))))
    # The first decodes at position 6; the second computes 0 and 1.
    assert batch.slots.tolist() == [2 * 4 + 2, 3 * 4 + 2, 4 * 4, 5 * 4, 4 * 4 + 1, 5 * 4 + 1]
    assert batch.block_tables[:, :4].tolist()[0] == [0, 1, 2, 3]
    assert batch.block_tables[1, :2].tolist() == [4, 5]


def test_a_snapshot_says_whose_layers_a_block_holds():
    house = Grouped(num_blocks=8)
    desk = MemoryDesk(house.memory, None, ManualClock(), lambda: None)
    house.cache(TWELVE[:5])
    house.start(1, [50, 51])
    # Block 0 and 1 can be found; the two of the second sequence are in its table alone.
    (table,) = desk.snapshot().tables
    assert table.block_ids == [3, 2]
    groups = desk.snapshot().kv_groups
    assert (len(groups), groups[:4].tolist()) == (8, [0, 1, 1, 0])
    assert [desk.explain(block_id).kv_group for block_id in (0, 1, 2, 3)] == [0, 1, 1, 0]


def test_one_group_of_layers_is_not_worth_a_column():
    house = Grouped(group_windows=(6,))
    house.start(1, TEN)
    desk = MemoryDesk(house.memory, None, ManualClock(), lambda: None)
    assert len(desk.snapshot().kv_groups) == desk.explain(1).kv_group == 0


def test_keys_name_the_group_and_all_windows():
    def root(group: int, *windows: int) -> bytes:
        return chain_root(
            model="m", block_size=4, salt=b"", group=group, group_windows=tuple(windows)
        )

    roots = [root(0), root(0, 0, 6), root(1, 0, 6), root(0, 0, 7), root(0, 0, 6, 6)]
    assert len(set(roots)) == len(roots)
    assert root(0) == chain_root(model="m", block_size=4, salt=b"")


class TestTables:
    def test_rows_with_missing_heads_are_filled_and_cut_in_the_order_of_entries(self):
        tables = BlockTables(2, 64, 4, num_groups=3)
        ids = np.array([7, 8, 9, 1, 2, 3], dtype=np.int32)
        tables.fill(1, ids, [0, 2, 1])
        assert tables.columns_of(1).tolist() == [0, 3, 5, 6, 7, 8]
        assert tables.blocks_of(1).tolist() == [7, 8, 9, 1, 2, 3]
        assert (tables.num_blocks[1], tables.num_held(1)) == (9, 6)
        assert np.argwhere(tables.is_valid()).tolist() == [[1, c] for c in (0, 3, 5, 6, 7, 8)]
        assert tables.cut_head(1, np.array([0, 2, 2], dtype=np.int32)).tolist() == [9]
        assert tables.cut_tail(1, 6).tolist() == [1, 2, 3]
        assert tables.clear(1).tolist() == [7, 8]
        assert (tables.num_blocks[1], tables.num_held(1)) == (0, 0)

    def test_several_groups_leave_their_windows_at_once_head_first(self):
        tables = BlockTables(1, 64, 4, num_groups=2)
        tables.fill(0, np.arange(8, dtype=np.int32))
        assert tables.cut_head(0, np.array([1, 3], dtype=np.int32)).tolist() == [0, 1, 3, 5]
        assert tables.blocks_of(0).tolist() == [2, 4, 6, 7]

    def test_a_row_needs_blocks_of_all_groups_at_a_boundary(self):
        tables = BlockTables(2, 64, 4, num_groups=2)
        rows = np.array([0, 1], dtype=np.int32)
        tables.fill(0, np.array([0, 1], dtype=np.int32))
        assert [tables.num_missing(0, n) for n in (4, 5, 9)] == [0, 2, 4]
        computed = np.array([3, 0], dtype=np.int32)
        assert tables.rows_at_boundary(rows, computed).tolist() == [1]
        computed[0] = 4
        assert tables.rows_at_boundary(rows, computed).tolist() == [0, 1]
        tables.append_each(rows, np.array([4, 5, 6, 7], dtype=np.int32))
        assert (tables.blocks_of(0).tolist(), tables.blocks_of(1).tolist()) == (
            [0, 1, 4, 5],
            [6, 7],
        )


def test_a_long_sequence_with_few_layers_that_see_everything_holds_a_fifth_of_the_bytes():
    """The shape of Gemma 3 4B: 34 layers, of which 29 see 1,024 positions; six to a group."""
    groups = group_layers([0 if layer % 6 == 5 else 1024 for layer in range(34)])
    num_tokens = 32_768
    memory = build_memory(
        MemoryOptions(
            num_blocks=20_000,
            block_size=16,
            max_num_sequences=1,
            max_model_len=num_tokens + 1,
            group_windows=groups.windows,
        ),
        trace=RecordingSink(),
    )
    sequence = memory.announce(request(1, [0] * num_tokens))
    memory.seat(sequence, Match())
    for num_computed in range(2048, num_tokens + 1, 2048):
        memory.cover(sequence.row, num_computed)
        memory.sequences.num_computed[sequence.row] = num_computed
        leave_window(memory, np.array([sequence.row], dtype=np.int32))
    # One group of six that see everything; of the others, what 1,023 positions back needs.
    assert memory.account().held == 2048 + 5 * 64
    assert 2368 * groups.num_layers_each / (2048 * 34) == pytest.approx(0.204, abs=1e-4)
