"""Beam searches on their way: one sequence in line and in the books, its beams in the executor.

step          k                     k + 1                      k + 2
root          [last of prompt)      ends
beams                               branch, one token each     branch, one token each
result        candidates of root    candidates of beams        ...

The *root* is a sequence like any other until its prompt is computed. Then its beams run for it:
sequences of the executor that no book here knows by itself, only their search. The root stays among
the running and stands for all of them; it is asked for nothing. Every plan says how all beams of
all searches go on, so each waits for the result before it.

A search that loses any of its beams starts over from its prompt, which it finds in the prefix
cache as long as that is there. It is deterministic, so it comes to the same end. Nothing was
delivered by then, and one sequence in line cannot wait for another half of its search, which two
searches that each got half of their blocks back would do for ever.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from pageframe.core.beams import ending_tokens
from pageframe.core.plan import Recovery, Victims
from pageframe.core.replica import ReplicaFacts
from pageframe.core.request import StallCause, Submission
from pageframe.core.step import Candidates, FinishReason, SequenceAccount, StepResult
from pageframe.scheduler.beams import (
    BeamGroup,
    Branch,
    Hypothesis,
    num_candidates,
)
from pageframe.scheduler.budget import Capacity, PlanBuilder
from pageframe.scheduler.endings import Endings, failure_of
from pageframe.scheduler.flights import Flight
from pageframe.scheduler.losses import Losses
from pageframe.scheduler.roster import Roster
from pageframe.scheduler.sequence import Knowledge, Sequence
from pageframe.scheduler.tracing import SchedulerTracer


@dataclass(slots=True, eq=False, kw_only=True)
class Search:
    """One search whose prompt is computed.

    Attributes:
        root: The sequence that stands for it.
        group: Its beams.
        branches: How they go on; the next plan says so.
        dropped_ids: Beams without a child, which the next plan ends.
        living_ids: All that the executor may know of it; the root too until it has branched.
        num_tokens: Tokens that its beams have computed.
        compute_start_ns: What its root had spent on computing when it began.
        account: What its beams did to memory, and what the root found there.
    """

    root: Sequence
    group: BeamGroup
    branches: list[Branch] = field(default_factory=list)
    dropped_ids: list[int] = field(default_factory=list)
    living_ids: set[int] = field(default_factory=set)
    num_tokens: int = 0
    compute_start_ns: int = 0
    account: SequenceAccount = field(default_factory=SequenceAccount)

    @property
    def num_computed(self) -> int:
        """Positions of the prompt and of each beam that are computed."""
        return self.root.num_prompt_tokens + self.group.num_tokens - 1

    @property
    def executor_ids(self) -> set[int]:
        """All sequences of it that the executor knows, or will with the plan in flight."""
        return self.living_ids.union(branch.child_id for branch in self.branches)

    def num_blocks(self, capacity: Capacity) -> int:
        """Blocks that it holds after its next step, if its beams share but the prompt."""
        num_prompt_tokens = self.root.num_prompt_tokens
        num_shared = capacity.num_full_blocks(num_prompt_tokens)
        num_own = capacity.num_blocks(num_prompt_tokens + self.group.num_tokens) - num_shared
        return num_shared + max(1, len(self.branches)) * num_own

    @property
    def outputs(self) -> list[Hypothesis]:
        """What it has found, once it is done."""
        num_return = self.root.submission.num_samples
        return self.group.hypotheses[:num_return] if self.group.is_done else []

    @property
    def num_unreturned_tokens(self) -> int:
        """Tokens that were computed for beams that are not returned."""
        returned = {id(node) for output in self.outputs for node in output.computed_nodes()}
        return self.num_tokens - len(returned)


class Searches:
    """Makes plans for beams and reads what results say of them.

    Args:
        roster: Who runs.
        endings: Ends searches, and beams that are not wanted.
        losses: Follows those that lost their beams.
        tracer: Writes stalls.
        sequence_ids: Where beams take theirs.
    """

    def __init__(
        self,
        roster: Roster,
        endings: Endings,
        losses: Losses,
        tracer: SchedulerTracer,
        sequence_ids: Iterator[int],
    ) -> None:
        self._roster = roster
        self._endings = endings
        self._losses = losses
        self._tracer = tracer
        self._sequence_ids = sequence_ids
        self._facts: ReplicaFacts | None = None
        self._searches: list[Search] = []

    def restart(self, facts: ReplicaFacts) -> None:
        """Another executor: it knows no beam."""
        self._facts = facts
        self.forget()

    def forget(self) -> None:
        """The executor is gone, and all beams with it; their roots start over."""
        for search in self._searches:
            search.root.search = None
        self._searches = []

    def add_to(self, builder: PlanBuilder) -> None:
        """Let all beams go on; like decodes they are never left out of a step."""
        self.drop_ended()
        for search in self._searches:
            self._ask(builder, search)

    def drop_ended(self) -> None:
        """Forget searches that are over, so that their requests are gone at rest, too."""
        self._searches = [search for search in self._searches if search.root.search is search]

    def name_beams(self, builder: PlanBuilder) -> None:
        """Put the beams of a root that is named as a victim into its place."""
        roots = {search.root.sequence_id: search for search in self._searches}
        victims = builder.plan.victims
        if roots.keys().isdisjoint(victims.sequence_ids):
            return
        named = Victims()
        for sequence_id, generation, recovery, num_blocks, beneficiary_id in zip(
            victims.sequence_ids,
            victims.generations,
            victims.recoveries,
            victims.num_blocks,
            victims.beneficiary_ids,
            strict=True,
        ):
            search = roots.get(sequence_id)
            if search is None or sequence_id in search.living_ids:
                named.add(sequence_id, generation, recovery, beneficiary_id, num_blocks)
                continue
            for beam_id in sorted(search.living_ids.difference(search.dropped_ids)):
                named.add(beam_id, generation, Recovery.RECOMPUTE, beneficiary_id)
        builder.plan.victims = named

    def settle(self, flight: Flight, result: StepResult, start_ns: int, end_ns: int) -> None:
        """Take in candidates; begin searches, take them further, start them over, or end them."""
        for search in flight.searches:
            if search.root.search is search:
                self._settle(flight, search, result, start_ns, end_ns)
        for sequence_id, candidates in result.candidates.items():
            root = self._roster.sequences.get(sequence_id)
            if root is not None and root.is_living and root.search is None:
                self._begin(root, candidates, end_ns)

    def _ask(self, builder: PlanBuilder, search: Search) -> None:
        """Put one search into the plan, and set aside what its tokens take.

        Behind the last block each beam takes a new one; inside, all beams of a parent but one copy
        the block that they share.
        """
        for parent_id, child_id, token_id in search.branches:
            builder.plan.branches.add(parent_id, search.root.generation, child_id, token_id)
        builder.plan.finish += search.dropped_ids
        capacity = self._roster.capacity
        num_tokens = len(search.branches)
        position = search.num_computed
        num_blocks = num_tokens
        if position % capacity.block_size:
            num_blocks -= len({branch.parent_id for branch in search.branches})
        num_blocks *= capacity.num_kv_groups
        flight = builder.flight
        flight.searches.append(search)
        flight.num_decodes += num_tokens
        flight.num_context += num_tokens * position
        flight.num_blocks += num_blocks
        builder.num_tokens_left -= num_tokens
        builder.num_blocks_left -= num_blocks

    def _begin(self, root: Sequence, candidates: Candidates, end_ns: int) -> None:
        params, facts = root.submission.beams, self._facts
        assert params is not None, f"candidates of sequence {root.sequence_id}, which searches none"
        assert facts is not None, "a result without an executor"
        sampling = root.submission.sampling
        group = BeamGroup(
            params,
            root_id=root.sequence_id,
            ending_token_ids=ending_tokens(sampling, facts.eos_token_ids),
            max_tokens=sampling.max_tokens,
        )
        search = Search(
            root=root,
            group=group,
            living_ids={root.sequence_id},
            compute_start_ns=root.stalls.compute_ns,
            account=SequenceAccount(
                num_blocks_peak=self._roster.capacity.num_blocks(root.num_prompt_tokens),
                num_cached_tokens=root.num_shared_tokens,
            ),
        )
        root.search = search
        self._searches.append(search)
        self._advance(search, {root.sequence_id: candidates}, end_ns)

    def _settle(
        self, flight: Flight, search: Search, result: StepResult, start_ns: int, end_ns: int
    ) -> None:
        root = search.root
        children = {branch.child_id for branch in search.branches}
        search.living_ids |= children
        failed = [
            sequence_id
            for sequence_id, reason in zip(result.sampled_ids, result.finish_reasons, strict=True)
            if reason == FinishReason.ERROR and sequence_id in search.living_ids
        ]
        if root.sequence_id in result.released:
            # It has branched; from now on only its beams are known there.
            root.knowledge = Knowledge.UNKNOWN
            search.account = result.accounts.get(root.sequence_id, search.account)
        if failed:
            reason = result.errors.get(failed[0], "SEQUENCE_FAILED")
            self._endings.cancel(root, FinishReason.ERROR, end_ns, failure_of(root, reason))
        elif root.sequence_id in result.preempted_ids:
            # It gave way before it branched, as any sequence does.
            root.search = None
        elif result.candidates.keys() >= children:
            self._count(search)
            search.living_ids = children
            self._advance(search, result.candidates, end_ns)
            self._end_repetition(search, end_ns)
        else:
            self._start_over(flight, search, result, start_ns)

    def _advance(self, search: Search, candidates: dict[int, Candidates], end_ns: int) -> None:
        root = search.root
        before = set(search.group.beam_ids)
        search.branches = search.group.advance(candidates, self._sequence_ids)
        parents = {branch.parent_id for branch in search.branches}
        search.dropped_ids = sorted(before - parents)
        if search.group.is_done:
            reason = search.outputs[0].finish_reason
            self._endings.end(root, reason, end_ns, account=search.account)

    def _end_repetition(self, search: Search, end_ns: int) -> None:
        """One that started over has caught up: the time until now went into what it had lost."""
        root = search.root
        if root.is_living and search.num_computed == root.stalls.num_lost_tokens:
            self._tracer.end_run(root, end_ns)
            root.stalls.count_again(search.compute_start_ns)

    def _count(self, search: Search) -> None:
        """The beams have computed a token each; count what that did to memory."""
        num_tokens = len(search.branches)
        search.num_tokens += num_tokens
        # They cost what a prompt's tokens do, and none of them is known to be output.
        search.root.share.num_prompt_tokens += num_tokens
        capacity, account = self._roster.capacity, search.account
        position = search.num_computed
        num_parents = len({branch.parent_id for branch in search.branches})
        num_more = num_tokens - num_parents
        account.num_blocks_peak = max(account.num_blocks_peak, capacity.num_blocks(position + 1))
        account.num_blocks_shared += num_more * capacity.num_blocks(position)
        if position % capacity.block_size:
            account.num_copies_on_write += num_more * capacity.num_kv_groups

    def _start_over(
        self, flight: Flight, search: Search, result: StepResult, start_ns: int
    ) -> None:
        root, tracer = search.root, self._tracer
        tracer.end_run(root, start_ns)
        if search.num_computed < root.stalls.num_lost_tokens:
            root.stalls.count_again(search.compute_start_ns)
        self._endings.abandon(search.executor_ids)
        lost = [k for k, beam_id in enumerate(result.preempted_ids) if beam_id in search.living_ids]
        if lost:
            self._losses.begin(root, flight, result, lost[0], start_ns)
        root.search = None
        root.num_preemptions += 1
        root.preempt_tick = flight.tick
        self._roster.preempt(root, root.generation + 1)
        beneficiary = flight.beneficiaries.get(root.sequence_id)
        tracer.begin_stall(root, StallCause.PREEMPTED, start_ns, beneficiary)


def with_candidates(submission: Submission, facts: ReplicaFacts) -> Submission:
    """A search asks for candidates, as many as decide a step."""
    if submission.beams is None:
        return submission
    sampling = submission.sampling
    ending = ending_tokens(sampling, facts.eos_token_ids)
    count = num_candidates(submission.beams, ending, facts.vocab_size)
    return replace(submission, sampling=replace(sampling, num_candidates=count))
