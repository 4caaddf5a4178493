"""Refusals that all runners share, for what a caller may ask of their blocks and host slots."""

from pageframe.core.errors import InvalidRequestError, OutOfRangeError


def check_pool_size(num_blocks: int, num_blocks_max: int) -> None:
    """Make sure that a pool may have ``num_blocks`` blocks.

    Raises:
        OutOfRangeError: reason POOL_SIZE_OUT_OF_RANGE.
    """
    if not 1 <= num_blocks <= num_blocks_max:
        raise OutOfRangeError(
            "POOL_SIZE_OUT_OF_RANGE",
            f"the pool can have 1 to {num_blocks_max} blocks, not {num_blocks}",
            num_blocks=num_blocks,
            num_blocks_max=num_blocks_max,
        )


def check_block_id(block_id: int, num_blocks: int) -> None:
    """Make sure that a block is in the pool.

    Raises:
        OutOfRangeError: reason BLOCK_OUT_OF_RANGE.
    """
    if not 0 <= block_id < num_blocks:
        raise OutOfRangeError(
            "BLOCK_OUT_OF_RANGE",
            f"there is no block {block_id} in a pool of {num_blocks}",
            block_id=block_id,
            num_blocks=num_blocks,
        )


def check_host_slot(slot: int, num_slots: int) -> None:
    """Make sure that the host tier has a slot.

    Raises:
        OutOfRangeError: reason HOST_SLOT_OUT_OF_RANGE.
    """
    if not 0 <= slot < num_slots:
        raise OutOfRangeError(
            "HOST_SLOT_OUT_OF_RANGE",
            f"there is no slot {slot} in a host tier of {num_slots}",
            slot=slot,
            num_slots=num_slots,
        )


def check_block_data(data: bytes, block_bytes: int) -> None:
    """Make sure that ``data`` can be all of a block.

    Raises:
        InvalidRequestError: reason BLOCK_BYTES_INVALID.
    """
    if len(data) != block_bytes:
        raise InvalidRequestError(
            "BLOCK_BYTES_INVALID",
            f"a block holds {block_bytes} bytes, not {len(data)}",
            num_bytes=len(data),
            block_bytes=block_bytes,
        )
