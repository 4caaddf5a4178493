"""Names for what a block holds: equal keys, equal keys and values.

The simple thing is to look a block up by its own tokens. But keys and values depend on everything
before them too, on the model, and on who may see them. So a block is named by a hash over its
tokens and the name of the block before it, and the chain begins at a root that names the rest:

    root(model, block size, salt, adapter, dtype) ──▶ key of block 0 ──▶ key of block 1 ──▶ …
                                                          ▲ tokens 0        ▲ tokens 1

Two sequences share a key exactly when they agree from the first token to the last of that block,
under the same root. A tenant without the salt cannot compute a key of another tenant's block, so a
hit never crosses salts.

What is hashed is a list of fields, the first of which is a domain:

    type (1 byte) │ length (4 bytes, little-endian) │ content      for each field

A reader could cut such a message into its fields in one way only, so two different lists never
become the same message. (Without types and a fixed place for each, an adapter's name can pass for
a salt: vLLM issue 44701.) SHA-256, because a collision would hand one tenant the conversation of
another, and a hash made for tables can be led into one (vLLM advisory GHSA-rm76-4mrf-v9r8). The
chain itself is vLLM's prefix caching.
"""

import hashlib
from functools import cache
from typing import Final

from pageframe.executor.batch import Int32Array

BlockKey = bytes
"""SHA-256 digest, 32 bytes."""

KEY_BYTES: Final = 32
TOKEN_BYTES: Final = 4

_DOMAIN, _BYTES, _TEXT, _INTEGER = b"d", b"b", b"t", b"i"


def _field(kind: bytes, content: bytes) -> bytes:
    return kind + len(content).to_bytes(4, "little") + content


def _integer(number: int) -> bytes:
    return _field(_INTEGER, number.to_bytes(8, "little", signed=True))


def _text(text: str) -> bytes:
    # A folder may have a name that is not UTF-8; two different ones must stay different here.
    return _field(_TEXT, text.encode("utf-8", "surrogatepass"))


# Domains are short: a block of 16 tokens then takes 119 bytes, the most that fits two rounds of
# SHA-256. A block of 256 tokens stays under 2,048 bytes, above which hashlib gives up the GIL.
_ROOT_DOMAIN = _field(_DOMAIN, b"kv root")
_PRIVATE_DOMAIN = _field(_DOMAIN, b"kv private")
# All of a block's message up to its parent's key, which always has the same length.
_BLOCK_PREFIX = _field(_DOMAIN, b"kv block") + _field(_BYTES, bytes(KEY_BYTES))[:-KEY_BYTES]
# A hash that has read this far. To copy it takes an eighth less time than to begin a new one.
_begin_block = hashlib.sha256(_BLOCK_PREFIX).copy


@cache
def _tokens_header(num_bytes: int) -> bytes:
    """What stands before the tokens of a block; there is one size of blocks in a process."""
    assert num_bytes % TOKEN_BYTES == 0, f"tokens in {num_bytes} bytes"
    return _BYTES + num_bytes.to_bytes(4, "little")


def chain_root(
    *,
    model: str,
    block_size: int,
    salt: bytes,
    adapter: str = "",
    kv_dtype: str = "",
    group: int = 0,
    group_windows: tuple[int, ...] = (),
) -> BlockKey:
    """The key before block 0 of every sequence that may share blocks.

    Args:
        model: Name and revision of the model whose weights made the keys and values.
        block_size: Tokens per block; the same tokens in other blocks are other blocks.
        salt: Secret of the tenant, or of the tenants that an operator joined. May be empty.
        adapter: Name of the adapter on top of the model; empty for none.
        kv_dtype: Type that keys and values are kept in; empty for the model's own.
        group: Which group of layers the blocks hold.
        group_windows: Windows of all groups; empty where a block holds all layers.
    """
    assert block_size > 0, f"blocks of {block_size} tokens"
    fields = (
        _ROOT_DOMAIN,
        _text(model),
        _integer(block_size),
        _field(_BYTES, salt),
        _text(adapter),
        _text(kv_dtype),
        *(_integer(number) for number in (group, *group_windows) if group_windows),
    )
    return hashlib.sha256(b"".join(fields)).digest()


def child_key(parent: BlockKey, token_ids: bytes) -> BlockKey:
    """The key of a full block.

    Args:
        parent: Key of the block before it, or the root.
        token_ids: The block's tokens, little-endian int32, ``4 * block_size`` bytes.
    """
    assert len(parent) == KEY_BYTES, f"a key of {len(parent)} bytes"
    block = _begin_block()
    block.update(parent + _tokens_header(len(token_ids)) + token_ids)
    return block.digest()


def chain_keys(parent: BlockKey, token_ids: Int32Array, block_size: int) -> list[BlockKey]:
    """Keys of consecutive blocks, one for each *full* block of ``token_ids``.

    Args:
        parent: Key of the block before the first token, or the root.
        token_ids: int32 [n]; the first stands at a block boundary. ``n % block_size`` tokens at
            the end are no full block and have no key.
        block_size: Tokens per block.
    """
    assert len(parent) == KEY_BYTES, f"a key of {len(parent)} bytes"
    data = token_bytes(token_ids)
    stride = TOKEN_BYTES * block_size
    header = _tokens_header(stride)
    keys = []
    # The same message as in ``child_key``, without a call for each block.
    for start in range(0, len(data) - stride + 1, stride):
        block = _begin_block()
        block.update(parent + header + data[start : start + stride])
        parent = block.digest()
        keys.append(parent)
    return keys


def private_key(epoch: int, sequence_id: int, generation: int, logical_block: int) -> BlockKey:
    """The key of a block that only its own sequence may find again: one that is not full.

    It says nothing about content, so it is good only while the sequence keeps this generation, and
    sequence ids are used once in an epoch.
    """
    fields = (
        _PRIVATE_DOMAIN,
        _integer(epoch),
        _integer(sequence_id),
        _integer(generation),
        _integer(logical_block),
    )
    return hashlib.sha256(b"".join(fields)).digest()


def little_endian(token_ids: Int32Array) -> memoryview:
    """The bytes of a contiguous array of tokens, as ``token_bytes`` has them; copies nothing.

    On a big-endian machine it copies them all.
    """
    return token_ids.astype("<i4", copy=False).data.cast("B")


def token_bytes(token_ids: Int32Array) -> bytes:
    """Tokens as they are hashed and kept: little-endian int32, whatever this machine is."""
    return token_ids.astype("<i4", copy=False).tobytes()
