"""KV memory of one replica: pool, block tables, sequences, prefix index and host tier together.

Each method is one step in the life of a sequence and leaves all of them consistent. What to do, and
in which order, is decided by ``apply``. What stands on its own works on this object from beside:

    matching     what is in memory already       sharing      forks, and copies on write
    publishing   full blocks into the index      giving_up    preemption, windows
    transfers    what the next step moves        retaining    handles and sessions
    resizing     another size, while serving     integrity    the law of conservation
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from pageframe.core.plan import Announcement
from pageframe.core.replica import PoolAccount
from pageframe.core.step import RefusedBecause, SequenceAccount
from pageframe.core.trace import KvCause, KvOperation, TraceSink
from pageframe.executor.batch import Int32Array
from pageframe.executor.memory.block_columns import BlockState, HeldByTenant
from pageframe.executor.memory.block_keys import BlockKey, chain_root
from pageframe.executor.memory.block_pool import BlockPool
from pageframe.executor.memory.block_table import BlockTables
from pageframe.executor.memory.eviction import EvictionPolicy, LruEviction
from pageframe.executor.memory.host_tier import HostTier
from pageframe.executor.memory.key_chain import KeyChain
from pageframe.executor.memory.leaders import Leaders
from pageframe.executor.memory.matching import Match, find_prefix
from pageframe.executor.memory.options import MemoryOptions
from pageframe.executor.memory.prefix_index import PrefixIndex
from pageframe.executor.memory.purpose import Purpose
from pageframe.executor.memory.quotas import Quotas
from pageframe.executor.memory.retention import Retentions
from pageframe.executor.memory.sequence_table import NO_ROW, Sequence, SequenceTable
from pageframe.executor.memory.transfers import Transfers


class KvMemory:
    """Who runs where, over which blocks, and what is kept beside that.

    Attributes:
        options: Sizes and choices.
        pool: Owner of block state.
        tables: Block tables by row.
        sequences: Known sequences, and columns by row.
        host: What the host tier holds.
        transfers: Blocks that the next step has to move.
        leaders: Who is about to compute which prefix.
        quotas: Bounds of tenants.
        retentions: Prefixes kept by name.
        unready_ids: Sequences that must not be admitted by the plan that is applied next.
        epoch: Counts resets; sequence ids may be used again after one.
        last_received_step: Number of the last plan that came in order; 0 before the first.
        last_applied_step: Number of the last plan that was not refused; 0 before the first.
    """

    def __init__(
        self,
        options: MemoryOptions,
        *,
        trace: TraceSink,
        eviction: EvictionPolicy | None = None,
    ) -> None:
        self.options = options
        num_blocks_max = max(options.num_blocks, options.num_blocks_max)
        self.pool = BlockPool(
            options.num_blocks,
            trace,
            index=PrefixIndex(num_blocks_max, options.block_size),
            eviction=LruEviction() if eviction is None else eviction,
            num_blocks_max=num_blocks_max,
        )
        rows, length = options.max_num_sequences, options.max_model_len
        self.tables = BlockTables(rows, length, options.block_size, options.num_groups)
        self.sequences = SequenceTable(rows, length)
        self.host = HostTier(options.num_host_slots)
        self.transfers = Transfers(self.pool, self.host)
        self.leaders = Leaders()
        self.quotas = Quotas()
        self.retentions = Retentions(handle_ttl_ns_max=options.handle_ttl_max_ns)
        self.unready_ids: frozenset[int] = frozenset()
        self.epoch = 0
        self.last_received_step = 0
        self.last_applied_step = 0
        self._trace = trace
        if options.num_host_slots:
            self.pool.on_evict(self._demote)

    def account(self) -> PoolAccount:
        """Blocks by state, the host tier included."""
        columns = self.pool.columns
        return self.pool.account(
            num_yieldable=(
                columns.num_yieldable - self.num_protected(columns.num_yieldable_by_tenant, {})
            ),
            num_host_total=self.host.num_slots,
            num_host_used=self.host.num_used,
        )

    def announce(self, announcement: Announcement) -> Sequence:
        """Know a sequence that was not known; it holds no blocks yet."""
        salt, sequence_id = announcement.cache_salt, announcement.sequence_id
        chains = [
            KeyChain(self.root_key(salt, sequence_id, group))
            for group in range(self.options.num_groups)
        ]
        sequence = Sequence(
            sequence_id=announcement.sequence_id,
            generation=announcement.generation,
            num_prompt_tokens=announcement.num_prompt_tokens,
            sampling=announcement.sampling,
            sample_index=announcement.sample_index,
            parked_tokens=np.array(announcement.token_ids, dtype=np.int32),
            keys=chains[0],
            more_keys=tuple(chains[1:]),
            request_id=announcement.request_id,
            tenant_id=self.pool.tenants.id_of(announcement.tenant),
            is_steered=announcement.is_steered,
            session_id=announcement.session_id,
            trace_context=(announcement.trace_id, announcement.span_id),
        )
        self.enter(sequence)
        return sequence

    def root_key(self, cache_salt: bytes, sequence_id: int = 0, group: int = 0) -> BlockKey:
        """The key before block 0 of everything under this salt, in one group of layers.

        Without a prefix cache every sequence has a salt of its own: it can find what was swapped
        out for it, and nobody else can.
        """
        options = self.options
        if not options.has_prefix_cache:
            cache_salt = b"sequence %d" % sequence_id
        return chain_root(
            model=options.model,
            block_size=options.block_size,
            salt=cache_salt,
            kv_dtype=options.kv_dtype,
            group=group,
            group_windows=options.group_windows,
        )

    def match(self, sequence: Sequence) -> Match:
        """How much of a sequence without a row is in memory; changes nothing."""
        if not self.options.has_prefix_cache and not sequence.host_keys:
            return Match()
        return find_prefix(sequence, self.options, self.pool.index, self.host)

    def obstacle(
        self, tenant_id: int, num_blocks: int, num_yieldable: int = 0
    ) -> RefusedBecause | None:
        """Why a tenant cannot have so many more blocks now; None if it can.

        ``num_yieldable`` counts pinned blocks that would give way for it.
        """
        num_available = self.pool.num_available + num_yieldable
        if num_blocks > num_available:
            return RefusedBecause.POOL_FULL
        if self.quotas.is_empty:
            return None
        tenant, held = self.pool.tenants.name_of(tenant_id), self.num_held_by_tenant()
        if num_blocks <= self.quotas.allowance(tenant, num_available, held):
            return None
        is_over = self.quotas.num_over_ceiling(tenant, num_blocks, held) > 0
        return RefusedBecause.QUOTA if is_over else RefusedBecause.POOL_FULL

    def num_protected(
        self, by_tenant: list[int], needs: Mapping[int, int], held: list[int] | None = None
    ) -> int:
        """Of so many held blocks of each tenant, those that floors keep from others.

        O(tenants with a floor).

        Args:
            by_tenant: Blocks by tenant number; may end before the last tenant.
            needs: Blocks for whose sake they would be given up, by tenant: a floor does not stand
                in the way of its own tenant.
            held: Blocks that each tenant holds, if not what it holds now.
        """
        num_blocks = 0
        held = self.pool.columns.num_held_by_tenant if held is None else held
        for tenant, floor in self.quotas.floors():
            tenant_id = self.pool.tenants.id_of(tenant)
            if tenant_id < len(by_tenant):
                # What it needs below its floor is kept for it already; giving up helps nobody.
                num_takeable = held[tenant_id] + needs.get(tenant_id, 0) - floor
                num_blocks += max(0, by_tenant[tenant_id] - max(0, num_takeable))
        return num_blocks

    def num_above_floor(self, tenant_id: int) -> int:
        """Held blocks of a tenant that others may take."""
        held = self.pool.columns.num_held_by_tenant
        num_held = held[tenant_id] if tenant_id < len(held) else 0
        if self.quotas.is_empty:
            return num_held
        quota = self.quotas.quota_of(self.pool.tenants.name_of(tenant_id))
        return max(0, num_held - quota.floor_blocks)

    def num_held_by_tenant(self) -> Mapping[str, int]:
        """Blocks held by each tenant that was ever seen, also as they change later."""
        return HeldByTenant(self.pool.columns, self.pool.tenants)

    def seat(self, sequence: Sequence, match: Match) -> None:
        """Let a sequence run; it shares what was found, and catches up from there."""
        self.sequences.seat(sequence, match.num_tokens)
        if not sequence.num_preemptions:
            sequence.num_cached_tokens = match.num_tokens
        if match.block_ids:
            block_ids: Int32Array = np.array(match.block_ids, dtype=np.int32)
            self.pool.acquire(block_ids, self.purpose_of(sequence, KvCause.PREFIX_HIT))
            self.tables.fill(sequence.row, block_ids, match.first_blocks)
            sequence.num_blocks_shared += len(block_ids)
            self._own_tail(sequence)
        self.sequences.num_published[sequence.row] = match.num_tokens // self.options.block_size
        self._let_go_of_host(sequence)

    def fetch(self, sequence: Sequence, match: Match) -> None:
        """Bring in what the host tier has of a sequence; it may be seated after the step.

        Raises:
            BlocksExhaustedError: too few blocks are available; nothing was changed.
        """
        purpose = Purpose(
            KvCause.SWAP if sequence.host_keys else KvCause.PREFIX_HIT,
            sequence.sequence_id,
            sequence.generation,
            match.num_tokens,
            sequence.tenant_id,
        )
        found: Int32Array = np.array(match.block_ids, dtype=np.int32)
        operation = KvOperation.SWAP_IN if sequence.host_keys else KvOperation.PROMOTE
        self.transfers.fetch(operation, match.promotions, found, purpose)

    def cover(self, row: int, num_tokens: int) -> None:
        """Allocate what the row lacks to hold its first ``num_tokens`` tokens, for a prefill.

        Raises:
            BlocksExhaustedError: too few are available; nothing was changed.
        """
        num_missing = self.tables.num_missing(row, num_tokens)
        if num_missing:
            purpose = self.purpose_of(self.sequences.at_row(row), KvCause.PREFILL)
            self.tables.append(row, self.pool.allocate(num_missing, purpose))

    def cover_next(self, rows: NDArray[np.integer]) -> None:
        """Allocate a block for each of ``rows`` whose next token needs one, for a decode.

        Raises:
            BlocksExhaustedError: too few are available; nothing was changed.
        """
        sequences = self.sequences
        crossing = self.tables.rows_at_boundary(rows, sequences.num_computed)
        if len(crossing):
            takers = crossing
            if self.options.num_groups > 1:
                takers = np.repeat(crossing, self.options.num_groups)
            block_ids = self.pool.allocate_each(
                sequences.sequence_ids[takers],
                sequences.generations[takers],
                sequences.num_computed[takers],
                sequences.tenant_ids[takers],
                KvCause.DECODE,
            )
            self.tables.append_each(crossing, block_ids)

    def forget(self, sequence: Sequence, cause: KvCause) -> SequenceAccount:
        """End a sequence in any state: its blocks are released, and it is known no more."""
        if sequence.row != NO_ROW:
            if not self.options.has_prefix_cache:
                self._unpublish_private(sequence)
            self.vacate(sequence, cause)
        self._let_go_of_host(sequence)
        self.leaders.forget(sequence.sequence_id)
        self.sequences.remove(sequence)
        self._trace.sequence_end(sequence.sequence_id)
        return SequenceAccount(
            num_blocks_peak=sequence.num_blocks_peak,
            num_blocks_shared=sequence.num_blocks_shared,
            num_copies_on_write=sequence.num_copies_on_write,
            num_cached_tokens=sequence.num_cached_tokens,
            num_preemptions=sequence.num_preemptions,
            num_draft_tokens=sequence.num_draft_tokens,
            num_accepted_tokens=sequence.num_accepted_tokens,
        )

    def vacate(self, sequence: Sequence, cause: KvCause) -> int:
        """Take blocks and row from a running sequence, which keeps its tokens.

        Returns:
            How many blocks it gave up.
        """
        purpose = self.purpose_of(sequence, cause)
        self.note_peak(sequence)
        block_ids = self.tables.clear(sequence.row)
        self.sequences.unseat(sequence)
        self.release(block_ids, purpose)
        return len(block_ids)

    def reset(self) -> None:
        """Forget all sequences, for a new scheduler epoch. No step may be in flight.

        The prefix index, the host tier and what is kept by name survive.
        """
        self.pool.current_step = 0
        for sequence in self.sequences.all():
            self.forget(sequence, KvCause.TAKEOVER)
        self.pool.restart()
        self.last_received_step = self.last_applied_step = 0
        self.epoch += 1

    def enter(self, sequence: Sequence) -> None:
        """Know a sequence, and to which trace its operations belong."""
        self.sequences.add(sequence)
        trace_id, span_id = sequence.trace_context
        self._trace.sequence_begin(
            sequence.sequence_id,
            trace_id=trace_id,
            span_id=span_id,
            request_id=sequence.request_id,
            tenant=self.pool.tenants.name_of(sequence.tenant_id),
        )

    def _demote(self, block_ids: list[int], purpose: Purpose) -> None:
        """Keep what is about to be evicted in the host tier, if it can be found again at all."""
        keys = [self.pool.index.key_of(block_id) for block_id in block_ids]
        for block_id, key in zip(block_ids, keys, strict=True):
            assert key is not None, f"cached block {block_id} is not indexed"
            self.transfers.store(KvOperation.DEMOTE, [block_id], [key], purpose)

    def _own_tail(self, sequence: Sequence) -> None:
        """A block under a private key is written in place again: nobody else can ask for it."""
        tail, index = sequence.swapped_tail, self.pool.index
        if tail is None:
            return
        ends = self.tables.blocks_of(sequence.row)[-self.options.num_groups :]
        private = {index.block_of(key) for key in tail.keys}
        if private.issuperset(ends.tolist()):
            self.pool.unpublish(ends.copy(), self.purpose_of(sequence, KvCause.SWAP))

    def _let_go_of_host(self, sequence: Sequence) -> None:
        for key in sequence.host_keys:
            self.host.drop_hold(key)
        sequence.host_keys.clear()
        tail, sequence.swapped_tail = sequence.swapped_tail, None
        for key in tail.keys if tail is not None else ():
            self.host.discard(key)

    def _unpublish_private(self, sequence: Sequence) -> None:
        block_ids = self.tables.blocks_of(sequence.row)
        alone = block_ids[self.pool.columns.ref_counts[block_ids] == 1]
        self.pool.unpublish(alone, self.purpose_of(sequence, KvCause.FINISHED))

    def release(self, block_ids: Int32Array, purpose: Purpose) -> None:
        """Drop the references of a block table, head first."""
        # A block in quarantine has lost its references already.
        states = self.pool.columns.states[block_ids]
        self.pool.release(block_ids[states != BlockState.QUARANTINED], purpose)

    def note_peak(self, sequence: Sequence) -> None:
        """Remember how much a running sequence holds, before it gives something up."""
        num_blocks = self.tables.num_held(sequence.row)
        sequence.num_blocks_peak = max(sequence.num_blocks_peak, num_blocks)

    def purpose_of(self, sequence: Sequence, cause: KvCause) -> Purpose:
        """For a running sequence, where it stands now, and why."""
        return Purpose(
            cause,
            sequence.sequence_id,
            sequence.generation,
            int(self.sequences.num_computed[sequence.row]),
            sequence.tenant_id,
        )
