"""Prefixes kept by name: handles of ``KvMemoryService.Retain`` and sessions of chats.

    finish of a turn ─▶ pinned on the device ──idle──▶ held in the host tier ──expired──▶ let go
                             └──────────────── next turn: found again, pinned anew ───────┘

What is pinned counts as held by its tenant, so a quota bounds it; blocks beyond the quota are not
pinned and stay in the cache like any others. ``retention`` has the names and times, this file the
pins and copies.
"""

import bisect
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass

import numpy as np

from pageframe.core.errors import InvalidRequestError
from pageframe.core.plan import Announcement
from pageframe.core.trace import KvCause, KvOperation
from pageframe.executor.batch import Int32Array
from pageframe.executor.memory.block_keys import BlockKey, chain_keys
from pageframe.executor.memory.kv_memory import KvMemory
from pageframe.executor.memory.prefix_index import NO_BLOCK
from pageframe.executor.memory.purpose import Purpose
from pageframe.executor.memory.retention import NEVER, Retention, RetentionKind
from pageframe.executor.memory.sequence_table import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionTimes:
    """How long the blocks of a chat are kept after a turn.

    Attributes:
        idle_ns: Until they go to the host tier, or to the cache where there is none; 0 for never.
        ttl_ns: Until they are let go; 0 keeps no sessions.
    """

    idle_ns: int
    ttl_ns: int


def retain(
    memory: KvMemory,
    *,
    tenant: str,
    cache_salt: bytes,
    name: str,
    token_ids: AbstractSequence[int],
    expire_ns: int,
) -> Retention:
    """Keep the full blocks of a prefix; those that are not there yet as soon as they are.

    Raises:
        ResourceExhaustedError: RETENTIONS_FULL.
    """
    tokens = np.array(token_ids, dtype=np.int32)
    keys = _keys_of_groups(memory, cache_salt, tokens)
    return _keep(memory, RetentionKind.HANDLE, tenant, name, keys, expire_ns, NEVER)


def num_kept_tokens(memory: KvMemory, retention: Retention) -> int:
    """Tokens in full blocks of a prefix that are kept now.

    Blocks that no window reaches are kept by nobody; they count once all others are there.
    """
    block_size = memory.options.block_size
    places = memory.options.places_read(retention.num_tokens // block_size)
    lacking = {
        depth
        for (depth, _), key in zip(places, retention.keys, strict=True)
        if key not in retention.pinned
    }
    if not lacking:
        return retention.num_tokens
    return block_size * (len({depth for depth, _ in places}) - len(lacking))


def release_handle(memory: KvMemory, *, tenant: str, name: str) -> None:
    """Let go of a handle.

    Raises:
        NotFoundError: HANDLE_UNKNOWN; also for a handle of another tenant.
    """
    _let_go(memory, memory.retentions.get(RetentionKind.HANDLE, tenant, name), KvCause.RETAIN)


def check_handle(memory: KvMemory, announcement: Announcement) -> None:
    """See that the handle a request names is its tenant's, and that its prompt begins with it.

    Raises:
        NotFoundError: HANDLE_UNKNOWN.
        InvalidRequestError: PREFIX_MISMATCH.
    """
    if not announcement.prefix_handle:
        return
    retention = memory.retentions.get(
        RetentionKind.HANDLE, announcement.tenant, announcement.prefix_handle
    )
    num_kept = retention.num_tokens
    tokens = np.array(announcement.token_ids[:num_kept], dtype=np.int32)
    keys = _keys_of_groups(memory, announcement.cache_salt, tokens)
    if _keys_to_keep(memory, keys) != retention.keys:
        raise InvalidRequestError(
            "PREFIX_MISMATCH",
            f"the prompt does not begin with the {num_kept} tokens of its prefix handle",
            num_kept_tokens=num_kept,
        )


def keep_session(memory: KvMemory, sequence: Sequence, times: SessionTimes, *, now_ns: int) -> None:
    """Keep the full blocks of a finished turn for the next one; the sequence still has its row.

    Raises:
        ResourceExhaustedError: RETENTIONS_FULL; the blocks are merely cached, like any others.
    """
    block_size = memory.options.block_size
    num_computed = int(memory.sequences.num_computed[sequence.row])
    token_ids = memory.sequences.tokens_of(sequence.row)
    _keep(
        memory,
        RetentionKind.SESSION,
        memory.pool.tenants.name_of(sequence.tenant_id),
        sequence.session_id,
        [chain.up_to(num_computed, token_ids, block_size) for chain in sequence.chains],
        now_ns + times.ttl_ns,
        now_ns + times.idle_ns if times.idle_ns else NEVER,
    )


def pass_time(memory: KvMemory, now_ns: int) -> bool:
    """Let go of what has expired and demote what is idle; whether anything changed.

    Demotion queues copies; they have to be made before any other change of the pool.
    """
    expired, idle = memory.retentions.due(now_ns)
    for retention in expired:
        _let_go(memory, retention, KvCause.EXPIRED)
    for retention in idle:
        pinned = [key for key in retention.keys if key in retention.pinned]
        demote(memory, retention, pinned, KvCause.SESSION)
    return bool(expired or idle)


def forget_block(memory: KvMemory, block_id: int) -> None:
    """A block was lost; nobody pins it any more."""
    for retention in memory.retentions:
        for key in [key for key, pinned in retention.pinned.items() if pinned == block_id]:
            memory.retentions.note_unpinned(retention, key)


def finish_transfers(memory: KvMemory) -> None:
    """The moves handed out have been made; what arrived is pinned for those who asked for it."""
    pin_wanted(memory, memory.transfers.finish())


def pin_wanted(memory: KvMemory, keys: AbstractSequence[BlockKey]) -> None:
    """Pin blocks, just indexed under ``keys``, that somebody asked to keep before."""
    if not len(memory.retentions):
        return
    for key in keys:
        for retention in memory.retentions.wanting(key):
            # An idle session has its content in the host tier; its next turn pins it again.
            if not (retention.is_session and key in retention.held_keys):
                _pin(memory, retention, [key])


def demote(
    memory: KvMemory, retention: Retention, keys: AbstractSequence[BlockKey], cause: KvCause
) -> None:
    """Have the host tier hold those pinned ``keys``, as far as it has room; unpin them all."""
    purpose = Purpose(cause, tenant_id=memory.pool.tenants.id_of(retention.tenant))
    if memory.host.num_slots:
        # Some may be held for it already, from before they were pinned again.
        new = [key for key in keys if key not in retention.held_keys]
        new_blocks = [retention.pinned[key] for key in new]
        held = memory.transfers.hold(KvOperation.DEMOTE, new_blocks, new, purpose)
        retention.held_keys.update(held)
    _unpin(memory, retention, keys, purpose)


def _keys_of_groups(
    memory: KvMemory, cache_salt: bytes, tokens: Int32Array
) -> list[list[BlockKey]]:
    """Keys of the full blocks in each group of layers."""
    options = memory.options
    return [
        chain_keys(memory.root_key(cache_salt, 0, group), tokens, options.block_size)
        for group in range(options.num_groups)
    ]


def _keys_to_keep(memory: KvMemory, keys: list[list[BlockKey]]) -> list[BlockKey]:
    """Those of a prefix, of all groups, that whoever goes on behind it reads."""
    if not any(memory.options.windows):
        keys_of_one, *others = keys
        if not others:
            return keys_of_one
    return [keys[group][depth] for depth, group in memory.options.places_read(len(keys[0]))]


def _keep(
    memory: KvMemory,
    kind: RetentionKind,
    tenant: str,
    name: str,
    keys: list[list[BlockKey]],
    expire_ns: int,
    demote_ns: int,
) -> Retention:
    retention = memory.retentions.open(
        name=name,
        tenant=tenant,
        kind=kind,
        keys=_keys_to_keep(memory, keys),
        expire_ns=expire_ns,
        demote_ns=demote_ns,
        num_tokens=len(keys[0]) * memory.options.block_size,
    )
    _give_back(memory, retention, retention.unlisted_keys(), KvCause.EXPIRED)
    wanted = [key for key in retention.keys if key not in retention.pinned]
    _pin(memory, retention, wanted)
    return retention


def _pin(memory: KvMemory, retention: Retention, keys: AbstractSequence[BlockKey]) -> None:
    """Pin those of ``keys`` that are on the device, from the head on, as far as the quota goes."""
    cause = KvCause.SESSION if retention.is_session else KvCause.RETAIN
    tenant_id = memory.pool.tenants.id_of(retention.tenant)
    found = [(key, memory.pool.index.block_of(key)) for key in keys]
    found = [(key, block_id) for key, block_id in found if block_id != NO_BLOCK]
    block_ids = np.array([block_id for _, block_id in found], dtype=np.int32)
    num_pinned = _num_within_quota(memory, tenant_id, block_ids)
    if num_pinned:
        purpose = Purpose(cause, tenant_id=tenant_id)
        memory.pool.pin(block_ids[:num_pinned], purpose, is_idle=retention.is_session)
    for key, block_id in found[:num_pinned]:
        memory.retentions.note_pinned(retention, key, block_id)


def _num_within_quota(memory: KvMemory, tenant_id: int, block_ids: Int32Array) -> int:
    """How many of these blocks, from the first, the tenant may come to hold."""
    if memory.quotas.is_empty:
        return len(block_ids)
    # What somebody holds already costs nothing more.
    num_new = np.cumsum(memory.pool.columns.ref_counts[block_ids] == 0).tolist()
    return bisect.bisect_left(
        num_new, 1, key=lambda num: num > 0 and memory.obstacle(tenant_id, num) is not None
    )


def _let_go(memory: KvMemory, retention: Retention, cause: KvCause) -> None:
    keys = list(dict.fromkeys([*retention.keys, *retention.unlisted_keys()]))
    _give_back(memory, retention, keys, cause)
    memory.retentions.close(retention)


def _give_back(
    memory: KvMemory, retention: Retention, keys: AbstractSequence[BlockKey], cause: KvCause
) -> None:
    """Unpin and unhold those of ``keys`` that are pinned or held."""
    for key in keys:
        if key in retention.held_keys:
            memory.host.drop_hold(key)
            retention.held_keys.discard(key)
    tenant_id = memory.pool.tenants.id_of(retention.tenant)
    pinned = [key for key in keys if key in retention.pinned]
    _unpin(memory, retention, pinned, Purpose(cause, tenant_id=tenant_id))


def _unpin(
    memory: KvMemory, retention: Retention, keys: AbstractSequence[BlockKey], purpose: Purpose
) -> None:
    if keys:
        block_ids = [retention.pinned[key] for key in keys]
        for key in keys:
            memory.retentions.note_unpinned(retention, key)
        unpinned: Int32Array = np.array(block_ids, dtype=np.int32)
        memory.pool.unpin(unpinned, purpose, is_idle=retention.is_session)
