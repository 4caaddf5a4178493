"""KV memory under audit: whatever it is asked for goes into the books as well, and is compared.

One call of a method is one operation.
"""

from collections import Counter
from collections.abc import Iterable

from bench.soak.answers import Answers
from bench.soak.auditor import Auditor
from bench.soak.bookkeeper import Bookkeeper
from bench.soak.device import Device, DeviceError
from bench.soak.entries import ViolationError
from bench.soak.known import Kept, KeptPrefixes, KnownSequence, names_of
from bench.soak.records import RecordSink
from bench.soak.shape import Shape
from bench.soak.writes import enter_write
from pageframe.core.clock import ManualClock
from pageframe.core.errors import PageframeError
from pageframe.core.plan import StepPlan
from pageframe.core.replica import TenantQuota
from pageframe.core.step import StepResult
from pageframe.core.trace import KvOperation
from pageframe.executor.batch import StepBatch
from pageframe.executor.engine import StepEngine
from pageframe.executor.memory.eviction import load_eviction_policy
from pageframe.executor.memory.retaining import SessionTimes

_RESIZE_REASONS = {
    "RESIZE_TOO_SMALL",
    "RESIZE_ABOVE_RESERVED",
    "RESIZE_BELOW_PINNED",
    "RESIZE_BELOW_HELD",
    "RESIZE_BELOW_RUNNING",
    "QUOTA_FLOORS_EXCEED_POOL",
}

# What the step before has filled is published before a plan is looked at, refused or not.
_BY_PUBLISHING = {KvOperation.INDEX, KvOperation.PIN}


class AuditedMemory:
    """See the module text.

    Attributes:
        shape: Sizes.
        clock: Moves by one nanosecond with every operation.
        device: Where blocks lie; told to fail by who drives this.
        books: The second set of books.
        auditor: Compares.
        kept: What is kept by name.
        num_operations: Operations so far.
        seen: Records by kind of operation.
        num_steps: Plans sent in this epoch.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.clock = ManualClock(1_000)
        self.device = Device(shape.window_tokens, shape.group_windows)
        self.kept = KeptPrefixes()
        self.num_operations = 0
        self.seen: Counter[str] = Counter()
        self.num_steps = 0
        self._builds_on = 0
        self._sink = RecordSink()
        times = SessionTimes(idle_ns=shape.session_idle_ns, ttl_ns=shape.session_ttl_ns)
        self._engine = StepEngine(
            self.device,
            num_blocks=shape.num_blocks,
            block_size=shape.block_size,
            max_num_sequences=shape.num_rows,
            max_step_tokens=shape.max_step_tokens,
            max_model_len=shape.max_model_len,
            trace=self._sink,
            clock=self.clock,
            num_blocks_max=shape.num_blocks_max,
            num_host_slots=shape.num_host_slots,
            has_prefix_cache=shape.has_prefix_cache,
            eviction=load_eviction_policy(shape.eviction),
            session_times=times,
        )
        self.books = Bookkeeper(shape.num_blocks_max, shape.block_size, shape.num_groups, self.kept)
        self.auditor = Auditor(self._engine, self.device, self.books, self.kept, shape)
        self._answers = Answers(self.books, self.kept, shape)
        self._has_evicted = False
        self._leaving: set[int] = set()
        if not self._read_records():
            self.books.open(range(shape.num_blocks))
        self._engine.on_launch = self._read_at_launch
        self.device.on_execute = self._write

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool now."""
        return self._engine.account().total

    @property
    def is_open(self) -> bool:
        """Whether nothing stands in the way of a sequence: nothing held, nobody bounded."""
        return not self._engine.account().held and not self.auditor.quotas

    @property
    def sequences(self) -> dict[int, KnownSequence]:
        """Known sequences by id."""
        return self.books.sequences

    def step(self, plan: StepPlan) -> StepResult:
        """Apply and compute a plan, whose two numbers are set here."""
        plan.step, plan.builds_on = self.num_steps + 1, self._builds_on
        self._register(plan)
        expected = self._answers.expect(plan, is_open=self.is_open)
        self.books.begin_step()
        self._has_evicted = False
        self._leaving = {*plan.finish, *(item.sequence_id for item in plan.announce)}
        failure = self._engine.last_failure
        result = self._engine.step(plan)
        has_failed = self._engine.last_failure is not failure
        if has_failed:
            self._take_failure()
        self.num_steps += 1
        if result.refusal:
            # Blocks of the step before are published all the same, and nobody has left.
            self._leaving = set()
            if not self._read_records() <= _BY_PUBLISHING:
                raise ViolationError(f"{result.refusal}, and yet something has changed")
            self._unregister(plan)
        else:
            self._builds_on = plan.step
            self._read_records()
            self._answers.read(
                plan,
                result,
                expected,
                has_failed=has_failed,
                has_evicted=self._has_evicted,
                now_ns=self.clock.now_ns(),
            )
        self._end_operation(is_step=not result.refusal)
        return result

    def cancel(self, sequence_ids: list[int]) -> StepResult:
        """End sequences between steps."""
        result = self._engine.cancel(sequence_ids)
        self._read_records()
        for sequence_id in result.released:
            self._answers.forget(sequence_id)
        self._end_operation()
        return result

    def retain(self, tenant: str, salt: int, name: str, token_ids: list[int], ttl_ns: int) -> int:
        """Keep a prefix by name; returns how many of its tokens are kept now, -1 when refused."""
        try:
            facts = self._engine.desk.retain(
                tenant=tenant,
                cache_salt=b"%d" % salt,
                name=name,
                token_ids=token_ids,
                ttl_ns=ttl_ns,
                now_ns=self.clock.now_ns(),
            )
        except PageframeError as error:
            self._expect_reason(error, {"QUOTA_EXCEEDED"})
            self.kept.drop(("handle", tenant, name))
            num_tokens = -1
        else:
            contents = names_of(salt, token_ids, self.shape)
            self.kept.keep(("handle", tenant, name), Kept(tenant, contents, facts.expire_ns))
            num_tokens = facts.num_tokens
            self._read_records()
            num_here = self._num_tokens_here(token_ids, contents)
            if not self.auditor.had_quotas and num_tokens != num_here:
                raise ViolationError(f"{num_tokens} tokens are kept, {num_here} are here")
        self._read_records()
        self._end_operation()
        return num_tokens

    def _num_tokens_here(self, token_ids: list[int], contents: list[int]) -> int:
        """Tokens of a prefix in logical blocks that are here; all, if nothing lacks."""
        size = self.shape.block_size
        num_blocks = len(token_ids) // size
        places = self.shape.places_read(num_blocks, num_blocks * size)
        here = {content for content in contents if content in self.books.found}
        lacking = {
            logical for (logical, _), it in zip(places, contents, strict=True) if it not in here
        }
        if not lacking:
            return num_blocks * size
        return size * len({logical for logical, _ in places} - lacking)

    def release(self, tenant: str, name: str) -> bool:
        """Let go of a handle; whether there was one."""
        is_known = ("handle", tenant, name) in self.kept.names()
        try:
            self._engine.desk.release(tenant=tenant, name=name)
        except PageframeError as error:
            self._expect_reason(error, set() if is_known else {"HANDLE_UNKNOWN"})
        self.kept.drop(("handle", tenant, name))
        self._read_records()
        self._end_operation()
        return is_known

    def set_quota(self, quota: TenantQuota) -> bool:
        """Bound a tenant; whether that was taken."""
        others = [other for other in self.auditor.quotas.values() if other.tenant != quota.tenant]
        is_taken = sum(other.floor_blocks for other in [*others, quota]) <= self.num_blocks
        try:
            self._engine.desk.set_quota(quota)
        except PageframeError as error:
            self._expect_reason(error, set() if is_taken else {"QUOTA_FLOORS_EXCEED_POOL"})
        else:
            self.auditor.quotas[quota.tenant] = quota
            self.auditor.had_quotas = True
        self._end_operation()
        return is_taken

    def resize(self, num_blocks: int) -> bool:
        """Give the pool another size; whether that was taken."""
        before = self._engine.account()
        try:
            outcome = self._engine.desk.resize(num_blocks)
        except PageframeError as error:
            self._expect_reason(error, _RESIZE_REASONS)
            if self._read_records():
                raise ViolationError(f"{error}, and yet something has changed") from error
            is_taken = False
        else:
            is_taken = True
            num_cached = min(before.cached, num_blocks - before.held)
            if (outcome.account.held, outcome.account.cached) != (before.held, num_cached):
                raise ViolationError(f"{before} became {outcome.account} at {num_blocks} blocks")
        self._read_records()
        self._end_operation()
        return is_taken

    def pass_time(self, delta_ns: int) -> None:
        """Let time pass."""
        self.clock.advance_ns(delta_ns)
        self._engine.desk.pass_time()
        self.kept.pass_time(self.clock.now_ns())
        self._read_records()
        self._end_operation()

    def take_over(self) -> None:
        """Another scheduler: sequences are forgotten, the rest stays."""
        self._engine.reset()
        self._read_records()
        for sequence_id in list(self.sequences):
            self._answers.forget(sequence_id)
        self.books.epoch += 1
        self.num_steps = self._builds_on = 0
        self._end_operation()

    def recount(self) -> None:
        """Compare everything, and add all books up anew."""
        self.auditor.recount()

    def expect_empty(self) -> None:
        """Every sequence has ended and nothing is kept: no block is held, fenced or pinned."""
        account = self._engine.account()
        if account.held or account.fenced or account.quarantined or account.pinned:
            raise ViolationError(f"nobody is here any more, and yet: {account}")
        if not self._engine.is_idle:
            raise ViolationError("sequences are known, and all were ended")

    def _end_operation(self, *, is_step: bool = False) -> None:
        self.num_operations += 1
        self._leaving = set()
        self.clock.advance_ns(1)
        self.auditor.look(is_step=is_step)

    def _read_at_launch(self) -> None:
        self._read_records()

    def _read_records(self) -> set[KvOperation]:
        """Enter what has happened into the books; which operations there were."""
        records = self._sink.take()
        # What a plan ends is ended before anything else.
        for sequence_id in self._leaving & self.sequences.keys() if records else ():
            self.books.unpromise(self.sequences[sequence_id])
            self.sequences[sequence_id].has_left = True
        self.seen.update(record.operation.name for record in records)
        self._has_evicted |= any(record.operation is KvOperation.EVICT for record in records)
        self.books.read(records)
        return {record.operation for record in records}

    def _take_failure(self) -> None:
        error = self._engine.last_failure
        if error is None or not isinstance(error.__cause__, DeviceError):
            raise ViolationError(f"{error}") from error
        self.books.lose_moves()

    def _write(self, batch: StepBatch) -> None:
        rows = self._engine.memory.sequences.sequence_ids[batch.rows].tolist()
        bounds, num_groups = batch.query_start.tolist(), self.shape.num_groups
        for sequence_id, start, end in zip(rows, bounds, bounds[1:], strict=False):
            enter_write(
                self.books,
                sequence_id,
                int(batch.positions[start]),
                batch.slots[start * num_groups : end * num_groups].tolist(),
                batch.token_ids[start:end].tolist(),
            )

    def _register(self, plan: StepPlan) -> None:
        """Know what the plan brings before the memory does: its records may name it."""
        for announcement in plan.announce:
            if announcement.sequence_id not in self.sequences:
                known = KnownSequence(
                    announcement, announcement.sampling.seed, self.shape.num_groups
                )
                self.sequences[announcement.sequence_id] = known
        for fork in plan.forks:
            parent = self.sequences.get(fork.parent_id)
            for child_id, sample_index in zip(fork.child_ids, fork.sample_indices, strict=True):
                self.books.parents[child_id] = fork.parent_id
                if parent is not None and child_id not in self.sequences:
                    self.sequences[child_id] = parent.fork(child_id, sample_index)

    def _unregister(self, plan: StepPlan) -> None:
        for announcement in plan.announce:
            if announcement.generation == 0:
                del self.sequences[announcement.sequence_id]
        for fork in plan.forks:
            for child_id in fork.child_ids:
                self.sequences.pop(child_id, None)

    def _expect_reason(self, error: PageframeError, reasons: Iterable[str]) -> None:
        if error.reason not in reasons:
            raise ViolationError(f"{error} was not to be expected") from error
