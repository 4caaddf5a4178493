"""The second set of books: who holds which block, and what it holds, by the law alone.

It is told what was asked and answered, and reads the records of operations, one after the other.
Each must be lawful where it stands, and says what a block is from then on. Nothing of the memory
is used here but the names of the states: this is dicts, sets and lists, slow and plain.
"""

from collections import Counter
from collections.abc import Callable

from bench.soak.entries import UNSETTLED, Block, Name, ViolationError
from bench.soak.fingerprints import NOTHING
from bench.soak.host_books import HostBooks
from bench.soak.known import KeptPrefixes, KnownSequence
from bench.soak.records import Record
from bench.soak.tables import Table
from pageframe.core.trace import KvCause, KvOperation
from pageframe.executor.memory.block_columns import BlockState

# A sequence that gets or shares a block for one of these has no place for it in its table yet.
_IN_TRANSIT = (KvCause.PREFIX_HIT, KvCause.SWAP)
# Their first list of ids are host slots.
_FROM_HOST = (KvOperation.PROMOTE, KvOperation.SWAP_IN)


class Bookkeeper:
    """See the module text.

    Attributes:
        blocks: By block id.
        tables: Blocks by running sequence.
        found: Block by name, of all that can be found.
        host: The host tier.
        sequences: Known sequences by id; kept by the caller, children of forks included before the
            step that forks them.
        parents: Parent by child, of the forks that were asked for.
        touched: Blocks named since this was last cleared.
        moved_tables: Sequences whose table has changed since this was last cleared.
        unsettled: Blocks that a pin took up, whose tenant is not known yet; and how many pins were
            given back on them since.
        pinned: Blocks with a pin.
        num_by_state: Blocks in each state.
        num_held: Held blocks by tenant.
        filled: Sequences and names of the blocks that they filled since this was last cleared.
        named: Names that were given since this was last cleared.
        epoch: How often a scheduler took over.
        forked: Children of forks in the step in progress.
    """

    def __init__(
        self, num_blocks_max: int, block_size: int, num_groups: int, kept: KeptPrefixes
    ) -> None:
        self.block_size = block_size
        self.num_groups = num_groups
        self._kept = kept
        self.blocks = [Block() for _ in range(num_blocks_max)]
        self.tables: dict[int, Table] = {}
        self.found: dict[Name, int] = {}
        self.host = HostBooks()
        self.sequences: dict[int, KnownSequence] = {}
        self.parents: dict[int, int] = {}
        self.touched: set[int] = set()
        self.moved_tables: set[int] = set()
        self.unsettled: dict[int, int] = {}
        self.pinned: set[int] = set()
        self.num_held: Counter[str] = Counter()
        self.num_by_state: Counter[BlockState | None] = Counter({None: num_blocks_max})
        self.filled: list[tuple[int, Name]] = []
        self.named: set[Name] = set()
        self.epoch = 0
        self._arriving: dict[int, Name] = {}
        self._private: dict[int, set[Name]] = {}
        self._leaving: set[tuple[int, int]] = set()
        self.forked: set[int] = set()
        self._moved_blocks: list[int] = []
        self._readers: dict[KvOperation, Callable[[Record], None]] = {
            KvOperation.ALLOCATE: self._allocate,
            KvOperation.SHARE: self._share,
            KvOperation.COPY_ON_WRITE: self._copy,
            KvOperation.RELEASE: self._release,
            KvOperation.FENCE_CLEAR: self._clear_fence,
            KvOperation.FREE: self._free,
            KvOperation.INDEX: self._index,
            KvOperation.UNINDEX: self._unindex,
            KvOperation.EVICT: self._evict,
            KvOperation.DEMOTE: self._store,
            KvOperation.SWAP_OUT: self._store,
            KvOperation.PROMOTE: self._fetch,
            KvOperation.SWAP_IN: self._fetch,
            KvOperation.PIN: self._pin,
            KvOperation.UNPIN: self._unpin,
            KvOperation.MOVE: self._move,
            KvOperation.RESIZE: self._resize,
        }

    def open(self, block_ids: range) -> None:
        """These blocks are in the pool, and free."""
        for block_id in block_ids:
            self._turn(block_id, BlockState.FREE)

    def read(self, records: list[Record]) -> None:
        """Enter records into the books; raises ``ViolationError`` at the first unlawful one."""
        for record in records:
            reader = self._readers.get(record.operation)
            if reader is None:
                raise ViolationError(f"{record} is not expected")
            if record.operation not in _FROM_HOST:
                self.touched.update(record.block_ids)
            reader(record)
            num_free = self.num_by_state[BlockState.FREE]
            # A change of size may be told in parts, each with what is free after the whole.
            if num_free != record.num_free_after and record.operation is not KvOperation.RESIZE:
                raise ViolationError(f"{num_free} blocks are free after {record}")

    def begin_step(self) -> None:
        """A plan comes."""
        self.forked.clear()
        self._moved_blocks.clear()
        self.host.begin_step()

    def settle(self, block_id: int, tenant: str) -> None:
        """It is known now who is charged for a block that a pin took up."""
        block = self.blocks[block_id]
        if block.state is BlockState.HELD and block.tenant == UNSETTLED:
            self.num_held[UNSETTLED] -= 1
            self.num_held[tenant] += 1
            block.tenant = tenant

    def lose_moves(self) -> None:
        """The device failed: nothing is known of what this step has moved."""
        for block_id in self._moved_blocks:
            self.blocks[block_id].content = [NOTHING] * self.block_size
        self.host.lose_stored()

    def unpromise(self, known: KnownSequence) -> None:
        """A sequence runs again, or has ended: the host tier need not keep anything for it."""
        self.host.promised.subtract(known.kept_names)
        known.kept_names = []
        if not known.has_left:  # Nobody else can ask for its last block.
            for name in self._private.pop(known.sequence_id, ()):
                self.host.forget_name(name)

    def private_names(self, known: KnownSequence, num_computed: int) -> list[Name]:
        """What the last blocks of a swapped-out sequence are found by while they are not full."""
        first = num_computed // self.block_size * self.num_groups
        return [
            (self.epoch, known.sequence_id, known.generation, entry)
            for entry in range(first, first + self.num_groups)
        ]

    def _turn(self, block_id: int, state: BlockState | None) -> None:
        block = self.blocks[block_id]
        self.num_by_state[block.state] -= 1
        self.num_by_state[state] += 1
        self.num_held[block.tenant] += (state is BlockState.HELD) - (block.state is BlockState.HELD)
        block.state = state

    def _expect(self, record: Record, block_id: int, *states: BlockState | None) -> Block:
        block = self.blocks[block_id]
        if block.state not in states:
            raise ViolationError(f"block {block_id} is {block} before {record}")
        return block

    def _allocate(self, record: Record) -> None:
        known = self.sequences[record.sequence_id]
        for block_id in record.block_ids:
            block = self._expect(record, block_id, BlockState.FREE)
            block.holders = {record.sequence_id: 1}
            block.tenant = known.tenant
            block.content = [NOTHING] * self.block_size
            self._turn(block_id, BlockState.HELD)
        if record.cause not in _IN_TRANSIT:
            self.unpromise(known)
            self.tables.setdefault(record.sequence_id, Table()).append(record.block_ids)
            self.moved_tables.add(record.sequence_id)

    def _share(self, record: Record) -> None:
        known = self.sequences[record.sequence_id]
        for block_id in record.block_ids:
            block = self._expect(record, block_id, BlockState.HELD, BlockState.CACHED)
            if record.cause is not KvCause.FORK and block.name is None:
                raise ViolationError(f"block {block_id} cannot be found, and is by {record}")
            if block.state is BlockState.CACHED:
                block.tenant = known.tenant
                self._turn(block_id, BlockState.HELD)
            block.holders[record.sequence_id] = block.holders.get(record.sequence_id, 0) + 1
        if record.cause is KvCause.PREFIX_HIT:
            self.unpromise(known)
        self.moved_tables.add(record.sequence_id)
        if record.cause is KvCause.FORK:
            parent_id = self.parents[record.sequence_id]
            if list(record.block_ids) != self.tables[parent_id].blocks():
                raise ViolationError(f"{record} is not the table of {parent_id}")
            self.forked.add(record.sequence_id)
            self.tables[record.sequence_id] = self.tables[parent_id].copy()
            return
        table = self.tables.setdefault(record.sequence_id, Table())
        entries = known.entries_by_name(self.block_size)
        for block_id in record.block_ids:
            block = self.blocks[block_id]
            entry = known.entry_of_hit(block.name, block.content, entries, self.block_size)
            if entry is None:
                raise ViolationError(f"{block} has nothing of the sequence of {record}")
            table.put(entry, block_id)

    def _copy(self, record: Record) -> None:
        sequence_id, table = record.sequence_id, self.tables[record.sequence_id]
        for source, target in zip(record.block_ids, record.target_ids, strict=True):
            self._expect(record, source, BlockState.HELD)
            copy = self._expect(record, target, BlockState.HELD)
            if copy.holders != {sequence_id: 1} or copy.name is not None:
                raise ViolationError(f"block {target} is {copy}, a copy goes there by {record}")
            copy.content = self.blocks[source].content.copy()
            # It was allocated to the end of the table; its place is that of the source.
            table.remove(target)
            table.put(table.remove(source), target)
            self._leaving.add((sequence_id, source))
            self._moved_blocks.append(target)
            self.touched.add(target)

    def _release(self, record: Record) -> None:
        sequence_id = record.sequence_id
        for block_id in record.block_ids:
            block = self._expect(record, block_id, BlockState.HELD)
            if not block.holders.get(sequence_id):
                raise ViolationError(f"{record} gives up block {block_id}, which is {block}")
            block.holders[sequence_id] -= 1
            if not block.holders[sequence_id]:
                del block.holders[sequence_id]
            self._settle_unreferenced(block_id)
        self._shorten_table(record)

    def _shorten_table(self, record: Record) -> None:
        sequence_id, table = record.sequence_id, self.tables.get(record.sequence_id, Table())
        self.moved_tables.add(sequence_id)
        for block_id in record.block_ids:
            if (sequence_id, block_id) in self._leaving:
                self._leaving.discard((sequence_id, block_id))
            elif self._arriving.pop(block_id, None) is None:
                table.remove(block_id)
        if not table:
            self.tables.pop(sequence_id, None)

    def _settle_unreferenced(self, block_id: int) -> None:
        block = self.blocks[block_id]
        if not block.num_references:
            self._turn(block_id, BlockState.CACHED if block.name is not None else BlockState.FENCED)

    def _clear_fence(self, record: Record) -> None:
        for block_id in record.block_ids:
            self._expect(record, block_id, BlockState.FENCED)

    def _free(self, record: Record) -> None:
        for block_id in record.block_ids:
            block = self._expect(record, block_id, BlockState.FENCED)
            block.tenant, block.content = "", []
            self._turn(block_id, BlockState.FREE)

    def _index(self, record: Record) -> None:
        known, size = self.sequences[record.sequence_id], self.block_size
        table = self.tables.get(record.sequence_id, Table())
        for block_id in record.block_ids:
            block = self._expect(record, block_id, BlockState.HELD)
            name = self._arriving.get(block_id)
            if name is None:
                logical, group = divmod(self._entry_of(record, table, block_id), self.num_groups)
                content = known.chains[group][logical * size : (logical + 1) * size]
                if block.content != content or len(content) < self.block_size:
                    raise ViolationError(f"block {block_id} does not hold what {record} says")
                name = content[-1]
            if block.name is not None or name in self.found:
                raise ViolationError(f"{name} is in block {self.found.get(name)} before {record}")
            block.name = name
            self.found[name] = block_id
            self.named.add(name)

    def _entry_of(self, record: Record, table: Table, block_id: int) -> int:
        entry = table.entry_of(block_id)
        if entry is None:
            raise ViolationError(f"block {block_id} is in no place of its table before {record}")
        return entry

    def _unindex(self, record: Record) -> None:
        for block_id in record.block_ids:
            block = self._expect(record, block_id, BlockState.HELD)
            if isinstance(block.name, int) and record.cause is not KvCause.FINISHED:
                raise ViolationError(f"{record} hides {block}, which is full")
            self._unname(record, block)

    def _unname(self, record: Record, block: Block) -> None:
        if block.name is None:
            raise ViolationError(f"{block} cannot be found before {record}")
        del self.found[block.name]
        block.name = None

    def _evict(self, record: Record) -> None:
        for block_id in record.block_ids:
            self._unname(record, self._expect(record, block_id, BlockState.CACHED))
            self._turn(block_id, BlockState.FENCED)

    def _store(self, record: Record) -> None:
        for block_id, slot in zip(record.block_ids, record.target_ids, strict=True):
            block = self._expect(record, block_id, BlockState.HELD, BlockState.CACHED)
            name = block.name
            if record.operation is KvOperation.SWAP_OUT:
                name = self._name_in_table(record, block_id)
            if name is None:
                raise ViolationError(f"block {block_id} cannot be found before {record}")
            self.host.store(slot, name, block.content)

    def _name_in_table(self, record: Record, block_id: int) -> Name:
        known = self.sequences[record.sequence_id]
        entry = self._entry_of(record, self.tables[record.sequence_id], block_id)
        logical, group = divmod(entry, self.num_groups)
        if (logical + 1) * self.block_size <= known.num_computed:
            return known.name_of_block(logical, group, self.block_size)
        name = self.epoch, record.sequence_id, known.generation + 1, entry
        self._private.setdefault(record.sequence_id, set()).add(name)
        return name

    def _fetch(self, record: Record) -> None:
        known = self.sequences[record.sequence_id]
        entries = known.entries_by_name(self.block_size)
        for slot, block_id in zip(record.block_ids, record.target_ids, strict=True):
            block = self._expect(record, block_id, BlockState.HELD)
            copy = self.host.copies.get(slot)
            if copy is None:
                raise ViolationError(f"nothing is known of slot {slot}, {record}")
            own = (self.epoch, known.sequence_id, known.generation)
            is_own = isinstance(copy.name, tuple) and copy.name[:3] == own
            if not is_own and copy.name not in entries:
                raise ViolationError(
                    f"slot {slot} has {copy.name}, no part of the sequence of {record}"
                )
            block.content = copy.content.copy()
            self._arriving[block_id] = copy.name
            self._moved_blocks.append(block_id)
            self.touched.add(block_id)

    def _pin(self, record: Record) -> None:
        for block_id in record.block_ids:
            block = self._expect(record, block_id, BlockState.HELD, BlockState.CACHED)
            if block.name is None:
                raise ViolationError(f"block {block_id} cannot be found and is pinned by {record}")
            if block.state is BlockState.CACHED:
                block.tenant = UNSETTLED
                self.unsettled[block_id] = 0
                self._turn(block_id, BlockState.HELD)
            block.num_pins += 1
            self.pinned.add(block_id)

    def _unpin(self, record: Record) -> None:
        for block_id in record.block_ids:
            block = self._expect(record, block_id, BlockState.HELD)
            if not block.num_pins:
                raise ViolationError(f"block {block_id} has no pin before {record}")
            block.num_pins -= 1
            if not block.num_pins:
                self.pinned.discard(block_id)
            if record.cause is KvCause.POOL_PRESSURE and isinstance(block.name, int):
                self._kept.give_way(block.name)
            elif block_id in self.unsettled:
                self.unsettled[block_id] += 1
            self._settle_unreferenced(block_id)

    def _move(self, record: Record) -> None:
        new_place = dict(zip(record.block_ids, record.target_ids, strict=True))
        for source, target in new_place.items():
            moved = self._expect(record, source, BlockState.HELD, BlockState.CACHED)
            self._expect(record, target, BlockState.FREE)
            self.blocks[target], self.blocks[source] = moved, self.blocks[target]
            if moved.name is not None:
                self.found[moved.name] = target
            if moved.num_pins:
                self.pinned.discard(source)
                self.pinned.add(target)
            self.touched.add(target)
        for sequence_id, table in self.tables.items():
            if table.rename(new_place):
                self.moved_tables.add(sequence_id)

    def _resize(self, record: Record) -> None:
        for block_id in record.block_ids:
            self._expect(record, block_id, BlockState.FREE)
            self._turn(block_id, None)
        for block_id in record.target_ids:
            self._expect(record, block_id, None)
            self._turn(block_id, BlockState.FREE)
            self.touched.add(block_id)
