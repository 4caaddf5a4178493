"""What a step is about to write, entered into the second set of books."""

from bench.soak.bookkeeper import Bookkeeper
from bench.soak.entries import ViolationError
from bench.soak.known import KnownSequence
from bench.soak.tables import Table


def enter_write(
    books: Bookkeeper, sequence_id: int, position: int, slots: list[int], token_ids: list[int]
) -> None:
    """A sequence is about to write tokens from ``position`` on into ``slots``, one in each group.

    Raises:
        ViolationError: tokens or blocks are not its own, or not its own alone.
    """
    known, size, num_groups = books.sequences[sequence_id], books.block_size, books.num_groups
    end = position + len(token_ids)
    if token_ids != known.tokens[position:end]:
        raise ViolationError(f"sequence {sequence_id} computes other tokens than its own")
    for logical in range(position // size, (end - 1) // size + 1):
        start, stop = max(position, logical * size), min(end, (logical + 1) * size)
        part = slots[(start - position) * num_groups : (stop - position) * num_groups]
        for group in range(num_groups):
            _write_block(books, known, start, part[group::num_groups], group)


def _write_block(
    books: Bookkeeper, known: KnownSequence, start: int, slots: list[int], group: int
) -> None:
    sequence_id, size = known.sequence_id, books.block_size
    table = books.tables.get(sequence_id, Table())
    block_id = table.block_at(start // size * books.num_groups + group)
    if block_id is None:
        raise ViolationError(f"sequence {sequence_id} writes outside its table, at {start}")
    slot = block_id * size + start % size
    if slots != list(range(slot, slot + len(slots))):
        raise ViolationError(f"sequence {sequence_id} writes outside block {block_id}")
    block = books.blocks[block_id]
    # A child that is forked in this step wants the token that its parent is writing.
    is_alone = block.holders.keys() - books.forked == {sequence_id}
    if not is_alone or block.num_pins or block.name is not None:
        raise ViolationError(f"sequence {sequence_id} writes into block {block_id}: {block}")
    written = known.chains[group][start : start + len(slots)]
    block.content[start % size : start % size + len(slots)] = written
    books.touched.add(block_id)
    if (start + len(slots)) % size == 0:
        books.filled.append((sequence_id, written[-1]))
