"""Reads the answers of steps, and holds them against what the law promises to sequences.

Each running sequence that has caught up gets a token, and the right one. An admission finds what
can be found, and at most all tokens but one. What was swapped out is not computed again. A sequence
that has the pool to itself is let in.
"""

from dataclasses import dataclass, field

from bench.soak.bookkeeper import Bookkeeper
from bench.soak.device import VOCAB_SIZE
from bench.soak.entries import Name, ViolationError
from bench.soak.fingerprints import token_after
from bench.soak.known import Kept, KeptPrefixes, KnownSequence
from bench.soak.shape import Shape
from pageframe.core.plan import StepPlan
from pageframe.core.step import FinishReason, RefusedBecause, StepResult

# Content of a sequence is promoted once; twice, when that pushed out what else it had found.
_NUM_PROMOTIONS_ALONE_MAX = 3


@dataclass(slots=True)
class Expected:
    """What is known before a step.

    Attributes:
        num_found: Tokens of whole blocks that can be found, by sequence that waits.
        caught_up: Sequences that have to get a token.
        alone_id: A sequence that has the pool to itself and asks to be let in; 0 for none.
    """

    num_found: dict[int, int] = field(default_factory=dict)
    caught_up: set[int] = field(default_factory=set)
    alone_id: int = 0


class Answers:
    """See the module text."""

    def __init__(self, books: Bookkeeper, kept: KeptPrefixes, shape: Shape) -> None:
        self._books = books
        self._kept = kept
        self._shape = shape

    def expect(self, plan: StepPlan, *, is_open: bool) -> Expected:
        """What the answer to a plan has to say; ``is_open`` if nothing is held and bounded."""
        sequences = self._books.sequences
        expected = Expected()
        asked = {*plan.may.sequence_ids, *(item.sequence_id for item in plan.announce)}
        for sequence_id in asked & sequences.keys():
            known = sequences[sequence_id]
            if not known.is_running:
                expected.num_found[sequence_id] = self._num_found(known)
        expected.caught_up = {
            known.sequence_id for known in sequences.values() if known.is_caught_up
        }
        if is_open and len(plan.may) == 1 and plan.may.num_tokens[0] == 1:
            expected.alone_id = plan.may.sequence_ids[0]
        return expected

    def read(
        self,
        plan: StepPlan,
        result: StepResult,
        expected: Expected,
        *,
        has_failed: bool,
        has_evicted: bool,
        now_ns: int,
    ) -> None:
        """Take in what a step has answered.

        Raises:
            ViolationError: it is not what it should be.
        """
        for sequence_id in result.released:
            self.forget(sequence_id)
        self._read_announced(plan, result, expected)
        self._read_preempted(result)
        self._read_refused(result, expected)
        for child_id in result.unforked_ids:
            self._books.sequences.pop(child_id, None)
        if not has_evicted and self._shape.has_prefix_cache:
            self._check_found(result, expected)
        self._read_computed(result)
        gone = {*result.released, *result.preempted_ids, *result.announced_ids}
        if missing := expected.caught_up - gone - {*result.sampled_ids}:
            raise ViolationError(f"{missing} had caught up and got no token")
        self._read_sampled(result, has_failed=has_failed, now_ns=now_ns)

    def forget(self, sequence_id: int) -> None:
        """A sequence has ended."""
        self._break_promise(self._books.sequences.pop(sequence_id))

    def _num_found(self, known: KnownSequence) -> int:
        """Tokens of whole blocks, as many as no group lacks what the token behind them reads."""
        shape, size, found = self._shape, self._shape.block_size, self._books.found

        def has(logical: int, group: int) -> bool:
            return known.name_of_block(logical, group, size) in found

        full = [group for group, window in enumerate(shape.windows) if not window]
        end = most = (len(known.tokens) - 1) // size
        if full:
            lacking = (at for at in range(most) if not all(has(at, group) for group in full))
            end = next(lacking, most)
        reach = [(group, window) for group, window in enumerate(shape.windows) if window]
        while end and not all(
            has(at, group)
            for group, window in reach
            for at in range(max(0, end * size - window + 1) // size, end)
        ):
            end -= 1
        return end * size

    def _read_announced(self, plan: StepPlan, result: StepResult, expected: Expected) -> None:
        columns = zip(
            result.announced_ids,
            result.num_cached_tokens,
            result.leader_ids,
            result.num_leader_tokens,
            strict=True,
        )
        generations = {item.sequence_id: item.generation for item in plan.announce}
        for sequence_id, num_cached, leader_id, num_led in columns:
            known = self._books.sequences[sequence_id]
            # One that was known before begins anew.
            self._break_promise(known)
            known.is_running = known.has_left = False
            known.num_computed, known.generation = 0, generations[sequence_id]
            least = expected.num_found.get(sequence_id, 0) if self._shape.has_prefix_cache else 0
            if not least <= num_cached < len(known.tokens):
                raise ViolationError(f"{num_cached} tokens of {sequence_id} are said to be here")
            if leader_id:
                self._check_leader(known, self._books.sequences[leader_id], num_led)

    def _check_leader(self, known: KnownSequence, leader: KnownSequence, num_led: int) -> None:
        end = num_led // self._shape.block_size * self._shape.block_size
        if not num_led < len(known.tokens) or known.chains[0][:end] != leader.chains[0][:end]:
            raise ViolationError(
                f"{leader.sequence_id} is said to lead {known.sequence_id} for {num_led} tokens"
            )

    def _read_preempted(self, result: StepResult) -> None:
        columns = zip(
            result.preempted_ids,
            result.preempted_generations,
            result.preempted_recoveries,
            result.preempted_num_computed,
            strict=True,
        )
        for sequence_id, generation, recovery, num_computed in columns:
            known = self._books.sequences[sequence_id]
            if generation != known.generation + 1 or num_computed > known.num_computed:
                raise ViolationError(f"{sequence_id} gave way as {generation}, {num_computed}")
            known.generation = generation
            if num_computed:
                known.num_computed = num_computed
                continue
            names = self._names_of(known, known.num_computed)
            if recovery.name == "SWAP" and self._books.host.has(names):
                known.num_kept, known.kept_names = known.num_computed, names
                self._books.host.promised.update(names)
            known.is_running, known.num_computed = False, 0

    def _read_refused(self, result: StepResult, expected: Expected) -> None:
        for sequence_id, because in zip(result.refused_ids, result.refused_because, strict=True):
            known = self._books.sequences.get(sequence_id)
            if known is None:
                continue
            is_alone = sequence_id == expected.alone_id
            is_promoting = because == RefusedBecause.PROMOTING
            known.num_promotions = known.num_promotions + 1 if is_alone and is_promoting else 0
            is_full = because in (RefusedBecause.POOL_FULL, RefusedBecause.QUOTA)
            is_stuck = is_full or known.num_promotions > _NUM_PROMOTIONS_ALONE_MAX
            if is_alone and is_stuck:
                raise ViolationError(
                    f"{sequence_id}, {len(known.tokens)} tokens, has the pool to itself, "
                    f"and is refused: {RefusedBecause(because).name}"
                )

    def _check_found(self, result: StepResult, expected: Expected) -> None:
        columns = zip(result.computed_ids, result.first_positions, strict=True)
        for sequence_id, position in columns:
            if position < expected.num_found.get(sequence_id, 0):
                raise ViolationError(
                    f"{sequence_id} begins at {position}, "
                    f"{expected.num_found[sequence_id]} of its tokens could be found"
                )

    def _read_computed(self, result: StepResult) -> None:
        columns = zip(result.computed_ids, result.first_positions, result.num_computed, strict=True)
        for sequence_id, position, num_computed in columns:
            known = self._books.sequences[sequence_id]
            if not known.is_running:
                if position < known.num_kept:
                    raise ViolationError(
                        f"{sequence_id} begins at {position}, the host tier had {known.num_kept}"
                    )
                self._break_promise(known)
                known.is_running, known.num_promotions = True, 0
            elif position != known.num_computed:
                raise ViolationError(f"{sequence_id} goes on at {position}, {known.num_computed}")
            if not position < num_computed <= len(known.tokens):
                raise ViolationError(f"{sequence_id} computed from {position} to {num_computed}")
            known.num_computed = num_computed

    def _read_sampled(self, result: StepResult, *, has_failed: bool, now_ns: int) -> None:
        columns = zip(result.sampled_ids, result.token_ids, result.finish_reasons, strict=True)
        for sequence_id, token_id, reason in columns:
            known = self._books.sequences[sequence_id]
            if reason == FinishReason.ERROR:
                if not has_failed:
                    raise ViolationError(f"{sequence_id} ended with an error, and nothing failed")
                self.forget(sequence_id)
                continue
            sample_index = known.announcement.sample_index
            lasts = [chain[-1] for chain in known.chains]
            wanted = token_after(lasts, sample_index, VOCAB_SIZE)
            if token_id != wanted:
                raise ViolationError(f"{sequence_id} got token {token_id} and not {wanted}")
            known.num_computed = len(known.tokens)
            is_over = known.num_computed + 1 >= known.num_tokens_max
            if (reason == FinishReason.LENGTH) != is_over:
                raise ViolationError(f"{sequence_id} has {known.num_computed} tokens and {reason}")
            if is_over:
                self._keep_session(known, now_ns)
                self.forget(sequence_id)
            else:
                known.append(token_id)

    def _keep_session(self, known: KnownSequence, now_ns: int) -> None:
        shape, name = self._shape, known.announcement.session_id
        if name and shape.session_ttl_ns:
            idle_ns = now_ns + shape.session_idle_ns if shape.session_idle_ns else 0
            end = known.num_computed // shape.block_size * shape.block_size
            names = known.names_read(end, end, shape)
            end_ns = now_ns + shape.session_ttl_ns
            kept = Kept(known.tenant, names, end_ns, idle_ns, is_session=True)
            self._kept.keep(("session", known.tenant, name), kept)

    def _names_of(self, known: KnownSequence, num_computed: int) -> list[Name]:
        names: list[Name] = [*known.names_read(num_computed, num_computed, self._shape)]
        if num_computed % self._shape.block_size:
            names += self._books.private_names(known, num_computed)
        return names

    def _break_promise(self, known: KnownSequence) -> None:
        """What the host tier held for it may go."""
        self._books.unpromise(known)
        known.num_kept = 0
