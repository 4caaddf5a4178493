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
from pageframe.scheduler.policies.protocols import Costs
from pageframe.scheduler.rates import Rates
from pageframe.scheduler.sequence import Loss, Sequence
from pageframe.scheduler.tracing import SchedulerTracer


class Losses:
    """Follows victims until they are back.

    Args:
        rates: What steps cost; told of every step here.
        tracer: Writes the spans.
    """

    def __init__(self, rates: Rates, tracer: SchedulerTracer) -> None:
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
            loss = sequence.loss
            if end - first > 1:
                loss.spent_ns += (end - first) * rates.last_token_ns
        for sequence_id, because in zip(result.refused_ids, result.refused_because, strict=True):
            sequence = sequences.get(sequence_id)
            if because == RefusedBecause.PROMOTING and sequence is not None and sequence.loss:
                self._count_copies(sequence.loss, result)

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
        loss = Loss(
            start_ns=start_ns,
            recovery=recovery,
            num_blocks=result.preempted_num_blocks[index],
            num_kept=result.preempted_num_computed[index],
            num_computed=sequence.num_computed,
            generation=sequence.generation,
            beneficiary=flight.beneficiaries.get(sequence.sequence_id),
            estimate_ns=_estimate_ns(flight.costs.get(sequence.sequence_id), recovery),
        )
        if sequence.loss is not None:
            # It had not caught up: what it still lacked has to be got back as well.
            loss.estimate_ns += max(0, sequence.loss.estimate_ns - round(sequence.loss.spent_ns))
            loss.is_first = False
        if recovery is Recovery.SWAP:
            self._count_copies(loss, result)
        self._tracer.preempt(sequence, loss)

    def end(self, sequence: Sequence, at_ns: int) -> None:
        """``sequence`` has caught up, if it had lost anything."""
        loss = sequence.loss
        if loss is None:
            return
        loss.is_back = True
        if loss.recovery is Recovery.RECOMPUTE and loss.is_first:
            self._rates.observe_return(loss.spent_ns, loss.num_computed)
        self._tracer.end_preempt(sequence, at_ns)

    def forget(self, sequence: Sequence, at_ns: int) -> None:
        """Its executor is gone; what it does now costs something else."""
        self._tracer.end_preempt(sequence, at_ns)
        sequence.preempt_tick = None

    def _count_copies(self, loss: Loss, result: StepResult) -> None:
        num_blocks = min(loss.num_blocks, result.timing.num_blocks_moved)
        loss.spent_ns += num_blocks * self._rates.last_block_ns


def _estimate_ns(costs: Costs | None, recovery: Recovery) -> int:
    """A swap that became a recompute is judged as what it became."""
    if costs is None:
        return 0
    cost_ns = costs.of(recovery)
    return costs.recompute_ns if cost_ns is None else cost_ns
