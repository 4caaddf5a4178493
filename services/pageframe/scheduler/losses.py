"""What victims lost, what getting it back was expected to cost, and what it did cost.

    victim taken ──▶ Loss open ──chunks, copies──▶ caught up, ended or lost again ──▶ span written

Cost is time of the device that the others of a step would not have needed: prefill tokens and
blocks moved, at the rates of the very step in which they were. How long the victim was away is the
length of its span; most of that is waiting, which stalls attribute.
"""

from collections.abc import Mapping

from pageframe.core.plan import Recovery
from pageframe.core.replica import ReplicaFacts
from pageframe.core.step import RefusedBecause, StepResult
from pageframe.scheduler.flights import Flight
from pageframe.scheduler.getting_back import num_own_full_blocks
from pageframe.scheduler.policies.protocols import Costs
from pageframe.scheduler.rates import Rates
from pageframe.scheduler.roster import Roster
from pageframe.scheduler.sequence import Loss, Sequence
from pageframe.scheduler.tracing import SchedulerTracer


class Losses:
    """Follows victims until they are back.

    Args:
        roster: Knows the sizes of blocks.
        rates: What steps cost; told of every step here.
        tracer: Writes the spans.
    """

    def __init__(self, roster: Roster, rates: Rates, tracer: SchedulerTracer) -> None:
        self._roster = roster
        self._rates = rates
        self._tracer = tracer

    def restart(self, facts: ReplicaFacts) -> None:
        """Another executor."""
        self._rates.restart(facts)

    def observe(self, result: StepResult, sequences: Mapping[int, Sequence]) -> None:
        """Count what an applied step did for victims; ahead of what it means for them."""
        rates = self._rates
        rates.observe(result)
        for sequence_id, end, first in zip(
            result.computed_ids, result.num_computed, result.first_positions, strict=True
        ):
            sequence = sequences.get(sequence_id)
            if sequence is None or sequence.loss is None:
                continue
            # A chunk of one token is a decode; what is behind the loss is no part of it.
            loss = sequence.loss
            num_again = min(end, loss.num_reached) - first
            if end - first > 1 and num_again > 0:
                loss.num_again_tokens += num_again
                loss.spent_ns += num_again * rates.last_token_ns
        for sequence_id, because in zip(result.refused_ids, result.refused_because, strict=True):
            sequence = sequences.get(sequence_id)
            if because == RefusedBecause.PROMOTING and sequence is not None and sequence.loss:
                self._count_promoted(sequence, sequence.loss, result)

    def begin(
        self,
        sequence: Sequence,
        flight: Flight,
        result: StepResult,
        index: int,
        start_ns: int,
    ) -> None:
        """``sequence`` is the victim at ``index`` of ``result``; its books are still as before."""
        recovery = result.preempted_recoveries[index]
        num_reached = sequence.num_reached
        loss = Loss(
            start_ns=start_ns,
            recovery=recovery,
            num_blocks=result.preempted_num_blocks[index],
            num_kept=result.preempted_num_computed[index],
            num_computed=sequence.num_computed,
            num_reached=num_reached,
            num_full_blocks=num_own_full_blocks(
                self._roster, sequence.num_given_tokens, num_reached
            ),
            generation=sequence.generation,
            beneficiary=flight.beneficiaries.get(sequence.sequence_id),
            estimate_ns=_estimate_ns(flight.costs.get(sequence.sequence_id), recovery),
        )
        if recovery is Recovery.SWAP:
            num_blocks = min(loss.num_blocks, result.timing.num_blocks_moved)
            loss.spent_ns += num_blocks * self._rates.last_block_ns
        self._tracer.preempt(sequence, loss)

    def end(self, sequence: Sequence, at_ns: int) -> None:
        """``sequence`` has caught up, if it had lost anything."""
        loss = sequence.loss
        if loss is None:
            return
        loss.is_back = True
        sequence.num_host_blocks = max(sequence.num_host_blocks, loss.num_moved_blocks)
        if loss.recovery is Recovery.RECOMPUTE and not loss.num_kept:
            self._observe_return(sequence, loss)
        elif loss.recovery is Recovery.SWAP:
            self._rates.observe_nothing(loss.num_full_blocks)
        self._tracer.end_preempt(sequence, at_ns)

    def forget(self, sequence: Sequence, at_ns: int) -> None:
        """Its executor is gone; what it does now costs something else."""
        self._tracer.end_preempt(sequence, at_ns)
        sequence.preempt_tick = None
        sequence.num_host_blocks = 0

    def _count_promoted(self, sequence: Sequence, loss: Loss, result: StepResult) -> None:
        """It waits for blocks from the host tier, and the step moved so many, for whomever.

        Each comes once; a step later it may be waiting for the same ones still.
        """
        num_lost = self._roster.capacity.num_blocks_held(loss.num_reached)
        num_blocks = min(num_lost - loss.num_moved_blocks, result.timing.num_blocks_moved)
        loss.num_moved_blocks += num_blocks
        loss.spent_ns += num_blocks * self._rates.last_block_ns

    def _observe_return(self, sequence: Sequence, loss: Loss) -> None:
        """What became of the blocks that it gave up and had filled."""
        num_full = self._roster.capacity.floor(loss.num_reached)
        num_full_tokens = num_full - sequence.num_given_tokens
        if num_full_tokens <= 0 or not loss.num_full_blocks:
            return
        num_gone = max(0, loss.num_again_tokens - (loss.num_reached - num_full))
        self._rates.observe_return(
            loss.num_full_blocks,
            moved_share=min(1.0, loss.num_moved_blocks / loss.num_full_blocks),
            gone_share=min(1.0, num_gone / num_full_tokens),
        )


def _estimate_ns(costs: Costs | None, recovery: Recovery) -> int:
    """A swap that became a recompute is judged as what it became."""
    if costs is None:
        return 0
    cost_ns = costs.of(recovery)
    return costs.recompute_ns if cost_ns is None else cost_ns
