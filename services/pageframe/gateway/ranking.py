"""Several outputs of one prompt of which the best are returned: ``best_of``, and beam searches.

``best_of`` samples more sequences than it returns. They are ranked by the mean log-probability of
their tokens under the model's own distribution, as OpenAI's completions define it; equals by their
sample index. Tokens that a stop string cut off do not count. Nothing goes out before the last
sample has ended. A beam search is ranked by the scheduler already.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from pageframe.core.errors import InvalidRequestError
from pageframe.core.limits import LIMITS
from pageframe.core.replica import ReplicaFacts
from pageframe.core.request import Delivery
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import TokenLogprobs
from pageframe.gateway.assembler import OutputAssembler
from pageframe.gateway.mailbox import Pending
from pageframe.gateway.output import Output, OutputDelta, SampleEnd
from pageframe.gateway.request import GenerateInput
from pageframe.gateway.sample_stream import SampleStream


def check_ranking(request: GenerateInput, sampling: SamplingParams, facts: ReplicaFacts) -> None:
    """Refuse what ``best_of`` or a beam search cannot be combined with.

    Raises:
        InvalidRequestError: BEST_OF_OUT_OF_RANGE, BEAMS_WITH_FIELD naming the field,
            DELIVERY_NOT_FINAL, RESUME_WITH_RANKING, or as ``BeamParams.validate``.
    """
    if request.beams is not None:
        request.beams.validate(sampling)
        request.beams.check_vocabulary(sampling, facts.vocab_size, facts.eos_token_ids)
        _check_fields(request)
    best_of = request.best_of
    if best_of is not None and not request.num_samples <= best_of <= LIMITS.num_samples_max:
        raise InvalidRequestError(
            "BEST_OF_OUT_OF_RANGE",
            f"best_of is {best_of}; it must lie in [{request.num_samples}, "
            f"{LIMITS.num_samples_max}], from n on",
            best_of=best_of,
            minimum=request.num_samples,
            maximum=LIMITS.num_samples_max,
        )
    if request.is_ranked and request.delivery is not Delivery.FINAL:
        raise InvalidRequestError(
            "DELIVERY_NOT_FINAL",
            f"outputs are ranked when the last has ended; delivery is {request.delivery.name}, "
            "leave it out or choose FINAL",
            delivery=request.delivery.name,
        )
    if request.is_ranked and request.resume_token_ids:
        raise InvalidRequestError(
            "RESUME_WITH_RANKING",
            f"outputs that are ranked, here the best of {request.num_sampled}, start over: none is "
            "known before all are",
            num_samples=request.num_sampled,
        )


def _check_fields(request: GenerateInput) -> None:
    """A search returns ``num_return`` outputs, ends them by tokens, and keeps no blocks."""
    others = {
        "num_samples": request.num_samples if request.num_samples != 1 else None,
        "best_of": request.best_of,
        "stop": len(request.stop) or None,
        "session_id": request.session_id or None,
    }
    for name, value in others.items():
        if value is not None:
            raise InvalidRequestError(
                "BEAMS_WITH_FIELD",
                f"{name} is {value}; a beam search goes without it",
                field=name,
                value=value,
            )


class RankingAssembler(OutputAssembler):
    """Keeps the outputs of all samples back until the last has ended; then gives out the best.

    Args:
        streams: One for each sample.
        num_returned: How many to give out.
        tells_logprobs: Whether the caller asked for log-probabilities, too.
    """

    def __init__(
        self, streams: Sequence[SampleStream], num_returned: int, *, tells_logprobs: bool
    ) -> None:
        super().__init__(streams, Delivery.FINAL)
        self._num_returned = num_returned
        self._tells_logprobs = tells_logprobs
        self._deltas: dict[int, OutputDelta] = {}

    def accept(
        self, pending: Mapping[int, Pending], prompt_logprobs: list[TokenLogprobs]
    ) -> tuple[list[Output], list[int]]:
        """Take what has gathered; see ``OutputAssembler.accept``."""
        outputs, stopped = super().accept(pending, [])
        for output in outputs:
            if isinstance(output, OutputDelta):
                self._keep(output)
        if not self.is_done or not outputs:
            return [], stopped
        return self._ranked(prompt_logprobs), stopped

    def _keep(self, delta: OutputDelta) -> None:
        # The rest of the text comes behind all tokens, in a delta without any.
        before = self._deltas.get(delta.sample_index)
        if before is not None:
            delta = before._replace(text=before.text + delta.text)
        self._deltas[delta.sample_index] = delta

    def _ranked(self, prompt_logprobs: list[TokenLogprobs]) -> list[Output]:
        scores = {index: _mean_logprob(self._deltas.get(index)) for index in self.ends}
        best = sorted(scores, key=lambda index: (-scores[index], index))
        returned, unreturned = best[: self._num_returned], best[self._num_returned :]
        num_unreturned = sum(self.ends[index].completion.num_output_tokens for index in unreturned)
        outputs: list[Output] = []
        for place, index in enumerate(returned):
            delta = self._deltas.get(index, OutputDelta(sample_index=index))
            outputs.append(
                delta._replace(
                    sample_index=place,
                    logprobs=delta.logprobs if self._tells_logprobs else [],
                    prompt_logprobs=[] if place else list(prompt_logprobs),
                )
            )
            outputs.append(
                _placed(self.ends[index], place, scores[index], 0 if place else num_unreturned)
            )
        prompt_logprobs.clear()
        return outputs


def _placed(end: SampleEnd, place: int, score: float, num_unreturned_tokens: int) -> SampleEnd:
    completion = dataclasses.replace(
        end.completion,
        sample_index=place,
        score=score,
        num_unreturned_tokens=num_unreturned_tokens,
    )
    return dataclasses.replace(end, sample_index=place, completion=completion)


def _mean_logprob(delta: OutputDelta | None) -> float:
    if delta is None or not delta.logprobs:
        return -float("inf")
    return sum(entry.logprob for entry in delta.logprobs) / len(delta.logprobs)
