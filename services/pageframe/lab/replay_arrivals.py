"""Takes arrivals and the cost of steps out of a recorded run, to serve the same under others."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from pageframe.core.errors import PreconditionError
from pageframe.core.journal import Entry, Header, ResultTaken, Submitted
from pageframe.core.plan import StepPlan
from pageframe.core.step import StepResult
from pageframe.core.units import NANOSECONDS_PER_SECOND
from pageframe.lab.replay import Replay, ReplayReport, begin
from pageframe.lab.simulate_arrivals import Arrival
from pageframe.lab.simulate_cost import DeviceCost

_NUM_STEPS_MIN = 20


@dataclass(slots=True, kw_only=True)
class RecordedWorkload:
    """What a journal says of its requests and its machine.

    Attributes:
        header: Of the journal.
        arrivals: Requests that were taken in, in order of time; beam searches are left out. Each
            sample makes as many tokens as sample 0 made, to its end or to where it was cancelled.
        cost: What steps cost, fitted to those that were measured.
        report: Of the replay that came before.
    """

    header: Header
    arrivals: list[Arrival]
    cost: DeviceCost
    report: ReplayReport


@dataclass(slots=True)
class _Notes:
    """What is gathered while a journal is replayed.

    Attributes:
        loads: Per step decodes, positions that they attend to, prefill tokens, pairs.
        lasted_ns: Per step, what it took.
    """

    submitted: dict[str, Submitted] = field(default_factory=dict)
    arrival_ns: dict[str, int] = field(default_factory=dict)
    request_of: dict[int, str] = field(default_factory=dict)
    num_computed: dict[int, int] = field(default_factory=dict)
    num_output: dict[str, int] = field(default_factory=dict)
    loads: list[tuple[float, ...]] = field(default_factory=list)
    lasted_ns: list[int] = field(default_factory=list)

    def on_plan(self, plan: StepPlan) -> None:
        """Learn whose sequences are whose; only sample 0 counts."""
        for announcement in plan.announce:
            if announcement.sample_index == 0:
                self.request_of[announcement.sequence_id] = announcement.request_id

    def on_result(self, result: StepResult) -> None:
        """Learn how many tokens came, and how long it took."""
        if result.refusal or not result.step:
            return
        for sequence_id, token_id in zip(result.sampled_ids, result.token_ids, strict=True):
            name = self.request_of.get(sequence_id)
            if name is not None and token_id >= 0:
                self.num_output[name] = self.num_output.get(name, 0) + 1
        self._note_load(result)

    def _note_load(self, result: StepResult) -> None:
        computed = dict(zip(result.computed_ids, result.num_computed, strict=True))
        num_context = num_decodes = 0
        for sequence_id in dict.fromkeys(result.sampled_ids):
            if sequence_id not in computed:
                num_decodes += 1
                self.num_computed[sequence_id] = self.num_computed.get(sequence_id, 0) + 1
                num_context += self.num_computed[sequence_id]
        num_tokens, num_pairs = 0, 0.0
        for sequence_id, first in zip(result.computed_ids, result.first_positions, strict=True):
            num_new = computed[sequence_id] - first
            num_tokens += num_new
            num_pairs += num_new * (first + (num_new + 1) / 2)
            self.num_computed[sequence_id] = computed[sequence_id]
        timing = result.timing
        lasted_ns = timing.apply_ns + timing.execute_ns + timing.sample_ns
        if lasted_ns > 0 and (num_decodes or num_tokens):
            self.loads.append((1.0, num_decodes, num_context, num_tokens, num_pairs))
            self.lasted_ns.append(lasted_ns)


def read_workload(entries: Iterable[Entry]) -> RecordedWorkload:
    """Replay a journal for what it says of its workload.

    Raises:
        PreconditionError: JOURNAL_MALFORMED, or JOURNAL_DIFFERS where this version decides
            otherwise, so that whose tokens are whose is not known.
    """
    notes = _Notes()
    running: Replay | None = None
    header: Header | None = None
    for entry in entries:
        if running is None:
            running = begin(entry, on_plan=notes.on_plan, compares_memory=False)
            assert isinstance(entry.call, Header), "a replay begins with a header"
            header = entry.call
            continue
        if isinstance(entry.call, Submitted) and not entry.raised:
            name = entry.call.submission.request_id
            notes.submitted[name] = entry.call
            notes.arrival_ns[name] = entry.now_ns
        if isinstance(entry.call, ResultTaken):
            notes.on_result(entry.call.result)
        running.feed(entry)
        if running.report.difference is not None:
            raise PreconditionError(
                "JOURNAL_DIFFERS",
                f"this version decides otherwise from step {running.report.difference.step} on; "
                "replay the journal without --policy to see how",
                step=running.report.difference.step,
            )
    if running is None or header is None:
        raise PreconditionError("JOURNAL_MALFORMED", "the journal is empty")
    return RecordedWorkload(
        header=header,
        arrivals=_arrivals_of(notes),
        cost=fit_cost(header, notes.loads, notes.lasted_ns),
        report=running.close(),
    )


def fit_cost(header: Header, loads: list[tuple[float, ...]], lasted_ns: list[int]) -> DeviceCost:
    """Coefficients that explain what steps took, none of them negative.

    Least squares over relative errors. A coefficient that comes out negative is left out, the
    worst first, and the others are fitted again.

    Raises:
        PreconditionError: TOO_FEW_STEPS.
    """
    if len(loads) < _NUM_STEPS_MIN:
        raise PreconditionError(
            "TOO_FEW_STEPS",
            f"{len(loads)} steps do not tell what steps cost; at least {_NUM_STEPS_MIN} do",
            num_steps=len(loads),
        )
    lasted = np.array(lasted_ns, dtype=np.float64)
    weighted = np.array(loads) / lasted[:, None]
    scales = np.maximum(np.abs(weighted).max(axis=0), 1e-30)
    costs = np.zeros(len(scales))
    left = list(range(len(scales)))
    while left:
        fitted = np.linalg.lstsq(weighted[:, left] / scales[left], np.ones(len(lasted)))[0]
        if fitted.min() >= 0:
            costs[left] = fitted / scales[left]
            break
        del left[int(fitted.argmin())]
    base, decode, context, prefill, pair = costs.tolist()
    facts = header.facts
    return DeviceCost(
        name=facts.model,
        base_ns=base,
        decode_ns=decode,
        context_ns=context,
        prefill_ns=prefill,
        pair_ns=pair,
        kv_bytes_per_token=facts.kv_bytes_per_token,
        kv_memory_bytes=facts.num_blocks * facts.block_size * facts.kv_bytes_per_token,
    )


def _arrivals_of(notes: _Notes) -> list[Arrival]:
    if not notes.arrival_ns:
        return []
    first_ns = min(notes.arrival_ns.values())
    arrivals = []
    for name, entry in notes.submitted.items():
        submission, arrival_ns = entry.submission, notes.arrival_ns[name]
        if submission.beams is not None:
            continue
        deadline_ns = submission.deadline_ns - arrival_ns if submission.deadline_ns else 0
        arrivals.append(
            Arrival(
                arrival_s=(arrival_ns - first_ns) / NANOSECONDS_PER_SECOND,
                num_prompt_tokens=len(submission.prompt_token_ids),
                num_output_tokens=max(1, notes.num_output.get(name, 0)),
                num_samples=submission.num_samples,
                tenant=submission.tenant,
                priority=submission.priority,
                deadline_s=deadline_ns / NANOSECONDS_PER_SECOND,
                prompt_token_ids=tuple(submission.prompt_token_ids),
            )
        )
    return sorted(arrivals, key=lambda arrival: arrival.arrival_s)
