"""Compares the memory with the second set of books: what was touched, or everything.

All that is read of the memory is plain columns: states, counts, tables. What they should say is in
the books.
"""

from collections import Counter

from bench.soak.bookkeeper import Bookkeeper
from bench.soak.device import Device
from bench.soak.entries import UNSETTLED, Block, Name, ViolationError
from bench.soak.fingerprints import NOTHING
from bench.soak.known import KeptPrefixes, KnownSequence
from bench.soak.shape import Shape
from bench.soak.tables import Table
from pageframe.core.replica import TenantQuota
from pageframe.executor.engine import StepEngine
from pageframe.executor.memory.block_columns import BlockState

_IN_USE = (BlockState.HELD, BlockState.CACHED)


class Auditor:
    """Looks into both sets of books.

    Attributes:
        quotas: Bounds of tenants, as they were set.
        had_quotas: Whether there ever were any: then some pins may be missing.
    """

    def __init__(
        self,
        engine: StepEngine,
        device: Device,
        books: Bookkeeper,
        kept: KeptPrefixes,
        shape: Shape,
    ) -> None:
        self._engine = engine
        self._device = device
        self._books = books
        self._kept = kept
        self._shape = shape
        self._num_held: Counter[str] = Counter()
        self._awaited: list[tuple[int, Name]] = []
        self.quotas: dict[str, TenantQuota] = {}
        self.had_quotas = False

    def look(self, *, is_step: bool) -> None:
        """Compare what was touched since the last look, and all counts.

        Args:
            is_step: Whether a step was made, and not refused.

        Raises:
            ViolationError: something differs, or is against the law.
        """
        books = self._books
        self._settle_tenants()
        for block_id in books.touched:
            self._compare_block(block_id)
        for known in books.sequences.values():
            if known.is_running or known.sequence_id in books.moved_tables:
                self._compare_sequence(known, has_moved=known.sequence_id in books.moved_tables)
        for sequence_id in books.moved_tables - books.sequences.keys():
            _expect(f"the table of {sequence_id}, gone", False, sequence_id in books.tables)
        self._compare_counts()
        self._check_quotas()
        self._check_findable(is_step=is_step)
        books.touched.clear()
        books.moved_tables.clear()
        self._kept.forget_let_go()

    def recount(self) -> None:
        """Compare everything, and add the books up anew.

        Raises:
            ViolationError: something differs, or is against the law.
        """
        books = self._books
        references: dict[int, Counter[int]] = {}
        for sequence_id, table in books.tables.items():
            for block_id in table.blocks():
                references.setdefault(block_id, Counter())[sequence_id] += 1
        for block_id, block in enumerate(books.blocks):
            self._compare_block(block_id)
            _expect(f"holders of {block_id}", references.get(block_id, {}), block.holders)
        for known in books.sequences.values():
            self._compare_sequence(known, has_moved=True)
        running = {known.sequence_id for known in books.sequences.values() if known.is_running}
        _expect("sequences with tables", running, books.tables.keys() | running)
        named = {
            block.name: place for place, block in enumerate(books.blocks) if block.name is not None
        }
        _expect("what can be found", books.found, named)
        for slot, copy in books.host.copies.items():
            if not _is_as_known(copy.content, self._device.host[slot]):
                raise ViolationError(f"host slot {slot} does not hold {copy.name}")
        self._compare_counts()
        _expect("violations found by the memory itself", [], self._engine.check_integrity())

    def _settle_tenants(self) -> None:
        """A block is charged to whose pin took it up, for as long as anybody holds it.

        That may be somebody who has given the pin back since, within the same operation.
        """
        pool = self._engine.memory.pool
        for block_id, num_given_back in self._books.unsettled.items():
            block = self._books.blocks[block_id]
            # Else the pin is gone again, and so is the block, or a sequence took it up.
            is_by_pin = block.state is BlockState.HELD and block.tenant == UNSETTLED
            if not is_by_pin or not isinstance(block.name, int):
                continue
            tenant = pool.tenants.name_of(int(pool.columns.tenant_ids[block_id]))
            tenants = {kept.tenant for kept in self._kept.of_content(block.name)}
            if num_given_back:
                tenants |= self._kept.let_go(block.name)
            if tenant not in tenants:
                raise ViolationError(f"block {block_id} is charged to {tenant}: {block}")
            self._books.settle(block_id, tenant)
        self._books.unsettled.clear()

    def _compare_block(self, block_id: int) -> None:
        block, pool = self._books.blocks[block_id], self._engine.memory.pool
        columns = pool.columns
        actual = (
            int(columns.states[block_id]),
            int(columns.ref_counts[block_id]),
            int(columns.pin_counts[block_id]),
            bool(pool.index.is_indexed[block_id]),
        )
        if block.state is None:
            _expect(f"block {block_id}, outside the pool", False, block_id < pool.num_blocks)
            return
        expected = (block.state, block.num_references, block.num_pins, block.name is not None)
        _expect(f"block {block_id}", expected, actual)
        if block.state is BlockState.HELD:
            tenant = pool.tenants.name_of(int(columns.tenant_ids[block_id]))
            _expect(f"tenant of {block_id}", block.tenant, tenant)
        if block.state in _IN_USE:
            if not _is_as_known(block.content, self._device.blocks[block_id]):
                raise ViolationError(
                    f"block {block_id} holds something else on the device: {block}"
                )
            self._check_pins(block_id, block)

    def _check_pins(self, block_id: int, block: Block) -> None:
        """As many pins as something keeps this content by name, fewer only by quota or idleness."""
        kept = self._kept.of_content(block.name) if isinstance(block.name, int) else []
        # A chat that has the content in the host tier need not have it here as well.
        is_in_host = block.name is not None and self._books.host.has([block.name])
        num_idle = sum(item.is_idle or (item.is_session and is_in_host) for item in kept)
        least = 0 if self.had_quotas else len(kept) - num_idle
        if not least <= block.num_pins <= len(kept):
            raise ViolationError(
                f"block {block_id} has {block.num_pins} pins; "
                f"{len(kept)} keep it by name, {num_idle} of them are idle"
            )

    def _compare_sequence(self, known: KnownSequence, *, has_moved: bool) -> None:
        memory, sequence_id = self._engine.memory, known.sequence_id
        sequence = memory.sequences.get(sequence_id)
        if sequence is None:
            raise ViolationError(f"sequence {sequence_id} is not known")
        what, row = f"sequence {sequence_id}", sequence.row
        table = self._books.tables.get(sequence_id, Table())
        _expect(f"{what} runs", known.is_running, row >= 0)
        _expect(f"generation of {what}", known.generation, sequence.generation)
        if not known.is_running:
            _expect(f"table of {what}, which waits", [], table.blocks())
            return
        _expect(f"table of {what}", table.blocks(), memory.tables.blocks_of(row).tolist())
        _expect(f"entries of {what}", table.entries(), memory.tables.columns_of(row).tolist())
        _expect(f"computed of {what}", known.num_computed, int(memory.sequences.num_computed[row]))
        _expect(f"tokens of {what}", len(known.tokens), int(memory.sequences.num_tokens[row]))
        num_blocks = -(-known.num_computed // self._books.block_size)
        for logical, group in self._shape.places_read(num_blocks, known.num_computed):
            if table.block_at(logical * self._books.num_groups + group) is None:
                raise ViolationError(
                    f"{what}, of which {known.num_computed} tokens are computed, "
                    f"has no block {logical} in group {group}"
                )
        self._compare_content(known, table, has_moved=has_moved)

    def _compare_content(self, known: KnownSequence, table: Table, *, has_moved: bool) -> None:
        """The table leads to the sequence's tokens; the last block is enough where none moved."""
        size, num_groups = self._books.block_size, self._books.num_groups
        last = (known.num_computed - 1) // size * num_groups
        entries = table.entries() if has_moved else range(last, last + num_groups)
        for entry in entries:
            start, block_id = entry // num_groups * size, table.block_at(entry)
            end = min(start + size, known.num_computed)
            if block_id is None or start >= end:
                continue
            expected = known.chains[entry % num_groups][start:end]
            if self._books.blocks[block_id].content[: len(expected)] != expected:
                raise ViolationError(
                    f"block {block_id} does not hold the tokens of sequence "
                    f"{known.sequence_id} from position {start} on"
                )

    def _compare_counts(self) -> None:
        account, number = self._engine.account(), self._books.num_by_state
        if not account.is_conserved:
            raise ViolationError(f"{account} does not add up")
        actual = (account.free, account.held, account.cached, account.fenced, account.quarantined)
        _expect("blocks by state", tuple(number[state] for state in BlockState), actual)
        _expect("used host slots", len(self._books.host), account.host_used)
        held = {name: num for name, num in self._books.num_held.items() if num}
        told = self._engine.memory.num_held_by_tenant()
        _expect("held by tenant", held, {name: num for name, num in told.items() if num})

    def _check_findable(self, *, is_step: bool) -> None:
        """What a step has filled can be found, in this block or in another of the same content.

        At the latest when the next step is over, and before the blocks are given up. Together with
        what is lawful for a record, no full block of a living sequence is lost to others, but for a
        duplicate: it stays unknown when the block that is known goes.
        """
        books = self._books
        awaited = [
            it for it in self._awaited if it[1] not in books.named and it[1] not in books.found
        ]
        if is_step and awaited:
            raise ViolationError(f"full for a whole step, and not to be found: {awaited}")
        filled = books.filled if self._shape.has_prefix_cache else []
        self._awaited = awaited + [
            (sequence_id, name)
            for sequence_id, name in filled
            if sequence_id in books.sequences and name not in books.found
        ]
        books.filled = []
        books.named.clear()

    def _check_quotas(self) -> None:
        """Nobody grew past its ceiling, or into what the floors of others still lack.

        Blocks that are only pinned count as available: pins give way.
        """
        before, now = self._num_held, Counter(self._books.num_held)
        self._num_held = now
        grown = {tenant for tenant in now if now[tenant] > before[tenant]}
        for tenant in grown & self.quotas.keys():
            ceiling = self.quotas[tenant].ceiling_blocks
            if ceiling is not None and now[tenant] > ceiling:
                raise ViolationError(f"{tenant} grew to {now[tenant]} blocks, over {ceiling}")
        number = self._books.num_by_state
        num_available = number[BlockState.FREE] + number[BlockState.CACHED]
        num_available += sum(not self._books.blocks[it].holders for it in self._books.pinned)
        num_lacking = sum(
            max(0, quota.floor_blocks - now[tenant])
            for tenant, quota in self.quotas.items()
            if tenant not in grown
        )
        if grown and num_lacking > num_available:
            raise ViolationError(
                f"{grown} grew; the floors of others lack {num_lacking} of {num_available} blocks"
            )


def _is_as_known(known: list[int], there: list[int]) -> bool:
    return known == there or all(
        left in (NOTHING, right) for left, right in zip(known, there, strict=True)
    )


def _expect(what: str, expected: object, actual: object) -> None:
    if expected != actual:
        raise ViolationError(f"{what}: {actual} and not {expected}")
