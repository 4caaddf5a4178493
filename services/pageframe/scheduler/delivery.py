"""Tokens and completions on their way to gateways, one ``TokenEvents`` per gateway and step.

The only work that grows with the tokens of a step is the loop in ``take_samples``: it is the
scheduler's hottest, so it appends to parallel lists and makes no object per token.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from pageframe.core.request import Completion, TokenEvents
from pageframe.core.step import FinishReason, StepResult, TokenLogprobs

if TYPE_CHECKING:
    from pageframe.scheduler.sequence import Sequence


class Outbox:
    """What one gateway will hear next."""

    __slots__ = ("events", "gateway_id", "num_requests")

    def __init__(self, gateway_id: int) -> None:
        self.gateway_id = gateway_id
        self.num_requests = 0
        self.events = TokenEvents(step=0)

    def complete(self, sequence: "Sequence", completion: Completion) -> None:
        """Send what is left of a sequence's tokens, then how it ended."""
        if sequence.submission.beams is not None:
            self._complete_search(sequence, completion)
            return
        if sequence.num_tokens_per_event > 1:
            self.flush(sequence)
        self.events.completions.append(completion)

    def _complete_search(self, sequence: "Sequence", completion: Completion) -> None:
        """Send what a search has found, best first; if it came to no end, how each output ended."""
        events, search = self.events, sequence.search
        outputs = [] if search is None else search.outputs
        if outputs and search is not None:
            completion.num_unreturned_tokens = search.num_unreturned_tokens
        for index in range(sequence.submission.num_samples):
            part = replace(completion, sample_index=index)
            if index:
                part.num_unreturned_tokens = 0
            if index < len(outputs):
                token_ids = outputs[index].token_ids
                events.handles.append(sequence.handle)
                events.sample_indices.append(index)
                events.num_tokens.append(len(token_ids))
                events.token_ids.extend(token_ids)
                part.num_output_tokens = len(token_ids)
                part.score = outputs[index].score
                part.finish_reason = outputs[index].finish_reason
            events.completions.append(part)

    def flush(self, sequence: "Sequence") -> None:
        """Send the tokens of a sequence that were held back."""
        token_ids = sequence.output[sequence.num_delivered :]
        if not token_ids:
            return
        events = self.events
        for index, logprobs in enumerate(sequence.pending_logprobs, len(events.token_ids)):
            events.logprobs[index] = logprobs
        sequence.pending_logprobs = []
        sequence.num_delivered = len(sequence.output)
        events.handles.append(sequence.handle)
        events.sample_indices.append(sequence.sample_index)
        events.num_tokens.append(len(token_ids))
        events.token_ids.extend(token_ids)


class Outboxes:
    """The outboxes of all gateways that have living requests or something left to hear."""

    def __init__(self) -> None:
        self._by_gateway: dict[int, Outbox] = {}

    def of(self, gateway_id: int) -> Outbox:
        """The gateway's outbox, made at need."""
        outbox = self._by_gateway.get(gateway_id)
        if outbox is None:
            outbox = self._by_gateway[gateway_id] = Outbox(gateway_id)
        return outbox

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits to be taken."""
        return all(outbox.events.is_empty for outbox in self._by_gateway.values())

    def take(self, step: int) -> list[tuple[int, TokenEvents]]:
        """Everything that waits, by gateway, marked with the step that made it."""
        taken = []
        for outbox in list(self._by_gateway.values()):
            events = outbox.events
            if not events.is_empty:
                events.step = step
                outbox.events = TokenEvents(step=0)
                taken.append((outbox.gateway_id, events))
            if not outbox.num_requests:
                del self._by_gateway[outbox.gateway_id]
        return taken


def take_samples(
    result: StepResult, sequences: Mapping[int, "Sequence"]
) -> list[tuple["Sequence", FinishReason]]:
    """Append each sampled token to its sequence and deliver it; returns the sequences that ended.

    Tokens of sequences that are gone or muted are dropped: their last step crossed our cancel.
    """
    ended: list[tuple[Sequence, FinishReason]] = []
    logprobs = _logprobs_in_order(result) if result.logprobs else {}
    lookup = sequences.get
    outbox: Outbox | None = None
    for sequence_id, token_id, reason in zip(
        result.sampled_ids, result.token_ids, result.finish_reasons, strict=True
    ):
        sequence = lookup(sequence_id)
        if sequence is None:
            continue
        if reason:
            ended.append((sequence, FinishReason(reason)))
            if token_id < 0:
                # It failed and got no token.
                continue
        if sequence.is_muted:
            continue
        sequence.output.append(token_id)
        sequence.share.num_output_tokens += 1
        if sequence.num_tokens_per_event > 1:
            _hold_back(sequence, logprobs[sequence_id].pop(0) if sequence_id in logprobs else None)
            continue
        if sequence.outbox is not outbox:
            outbox = sequence.outbox
            events = outbox.events
            add_handle = events.handles.append
            add_sample_index = events.sample_indices.append
            add_count = events.num_tokens.append
            add_token = events.token_ids.append
        if logprobs and sequence_id in logprobs:
            events.logprobs[len(events.token_ids)] = logprobs[sequence_id].pop(0)
        add_handle(sequence.handle)
        add_sample_index(sequence.sample_index)
        add_count(1)
        add_token(token_id)
    return ended


def _logprobs_in_order(result: StepResult) -> dict[int, list[TokenLogprobs]]:
    """Those of each sequence, one for each token that it got, first token first."""
    in_order: dict[int, list[TokenLogprobs]] = {}
    for index in sorted(result.logprobs):
        in_order.setdefault(result.sampled_ids[index], []).append(result.logprobs[index])
    return in_order


def _hold_back(sequence: "Sequence", logprobs: TokenLogprobs | None) -> None:
    if logprobs is not None:
        sequence.pending_logprobs.append(logprobs)
    if len(sequence.output) - sequence.num_delivered >= sequence.num_tokens_per_event:
        sequence.outbox.flush(sequence)
