"""Tokens and completions on their way to gateways, one ``TokenEvents`` per gateway and step.

Tokens that a step brings to those who had one in the step before come through ``lockstep``.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from pageframe.core.request import Completion, TokenEvents
from pageframe.core.step import TokenLogprobs

if TYPE_CHECKING:
    from pageframe.scheduler.sequence import Sequence


class Outbox:
    """What one gateway will hear next."""

    __slots__ = ("events", "gateway_id", "num_requests")

    def __init__(self, gateway_id: int) -> None:
        self.gateway_id = gateway_id
        self.num_requests = 0
        self.events = TokenEvents(step=0)

    def add(self, sequence: "Sequence", token_id: int, logprobs: TokenLogprobs | None) -> None:
        """Send the newest token of a sequence, or hold it back until there are enough."""
        if sequence.num_tokens_per_event > 1:
            if logprobs is not None:
                sequence.pending_logprobs.append(logprobs)
            if len(sequence.output) - sequence.num_delivered >= sequence.num_tokens_per_event:
                self.flush(sequence)
            return
        events = self.events
        if logprobs is not None:
            events.logprobs[len(events.token_ids)] = logprobs
        events.handles.append(sequence.handle)
        events.sample_indices.append(sequence.sample_index)
        events.num_tokens.append(1)
        events.token_ids.append(token_id)

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
