"""One request between its arrival at the gateway and its end."""

from collections.abc import Sequence

from pageframe.core.replica import ReplicaFacts
from pageframe.core.request import Completion
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import FinishReason
from pageframe.gateway.assembler import OutputAssembler
from pageframe.gateway.attribution import GatewayTimes, attribute
from pageframe.gateway.detokenizer import SilentDetokenizer
from pageframe.gateway.mailbox import Mailbox, Pending
from pageframe.gateway.output import Header, Output
from pageframe.gateway.ranking import RankingAssembler
from pageframe.gateway.request import GenerateInput
from pageframe.gateway.sample_stream import SampleStream
from pageframe.gateway.stop_strings import StopAutomaton
from pageframe.gateway.tokenizer import TextCodec
from pageframe.gateway.tracing import GenerateTrace


class RunningRequest:
    """Everything that belongs to one request, and nothing that outlives it.

    Attributes:
        request: As asked for.
        request_id: Its name, given or made.
        trace: Its ``generate`` span.
        mailbox: Where its tokens arrive.
        assembler: Makes outputs of them; empty before ``begin``.
    """

    def __init__(self, request: GenerateInput, request_id: str, trace: GenerateTrace) -> None:
        self.request = request
        self.request_id = request_id
        self.trace = trace
        trace.name(request_id, request.tenant)
        self.mailbox = Mailbox()
        self.assembler = OutputAssembler((), request.delivery)
        self._streams: list[SampleStream] = []
        self._sampling = request.sampling
        self._num_prompt_tokens = 0
        self._times = GatewayTimes(trace.start_ns)

    def begin(
        self,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        codec: TextCodec | None,
        model: str,
    ) -> None:
        """Prepare the outputs, once the prompt is tokenised and nothing is left open."""
        request = self.request
        self._num_prompt_tokens = len(prompt_token_ids)
        self._sampling = sampling
        automaton = StopAutomaton(request.stop)
        self._streams = [
            SampleStream(
                SilentDetokenizer()
                if codec is None
                else codec.detokenizer(skip_special_tokens=request.skip_special_tokens),
                automaton,
                include_stop=request.include_stop,
                min_tokens=sampling.min_tokens,
            )
            for _ in range(request.num_sampled)
        ]
        self.assembler = OutputAssembler(self._streams, request.delivery)
        if request.is_ranked and request.beams is None:
            self.assembler = RankingAssembler(
                self._streams,
                request.num_samples,
                tells_logprobs=request.sampling.num_logprobs >= 0,
            )
        self.trace.describe(request, sampling, model)

    def resume(self, facts: ReplicaFacts) -> list[Output]:
        """Bring all samples to where the caller is; the outputs, if all had ended there already."""
        outputs = self.request.resume_token_ids
        for stream, token_ids in zip(self._streams, outputs, strict=False):
            stream.feed(token_ids)
        reasons = [self._end_behind(*resumed, facts) for resumed in enumerate(outputs)]
        if not reasons or FinishReason.NONE in reasons:
            return []
        ends = {
            index: Pending(
                completion=Completion(
                    handle=0,
                    sample_index=index,
                    finish_reason=reason,
                    num_prompt_tokens=self._num_prompt_tokens,
                )
            )
            for index, reason in enumerate(reasons)
        }
        return self.assembler.accept(ends, [])[0]

    @property
    def stopped_samples(self) -> list[int]:
        """Samples that ended by a stop string before they were handed to the scheduler.

        It knows no stop strings and would go on; other ends it sees by itself.
        """
        return [index for index, stream in enumerate(self._streams) if stream.is_stopped]

    def submitted(self, now_ns: int) -> None:
        """It is handed to the scheduler now."""
        self._times.submit_ns = now_ns

    def take(self, now_ns: int) -> dict[int, Pending]:
        """Take all that has gathered, by sample index; accounts of those that end are complete.

        Raises:
            PageframeError: the request has failed.
        """
        pending = self.mailbox.take()
        self._times.lost_ns = self.mailbox.lost_ns
        for part in pending.values():
            if part.completion is not None:
                part.completion = attribute(part.completion, self._times, now_ns)
        return pending

    def header(self, sampling: SamplingParams, model: str) -> Header:
        """What the caller is told first."""
        return Header(
            request_id=self.request_id,
            seed=sampling.seed,
            trace_id=self.trace.trace_id.hex(),
            num_prompt_tokens=self._num_prompt_tokens,
            model=model,
        )

    def end(self, error: BaseException | None) -> None:
        """Record how it ended; ``error`` is None when it ended well."""
        ends = [self.assembler.ends[index] for index in sorted(self.assembler.ends)]
        if self.assembler.is_done and self._streams:
            # The consumer stopped asking behind the last output: nothing went wrong.
            error = None
        self.trace.place(self.mailbox.replica, self.mailbox.num_moves)
        self.trace.end(self._num_prompt_tokens, ends, error)

    def _end_behind(
        self, sample_index: int, token_ids: Sequence[int], facts: ReplicaFacts
    ) -> FinishReason:
        """Why the output of a sample that has these tokens is complete; NONE if it goes on."""
        if self._streams[sample_index].is_stopped:
            return FinishReason.STOP
        if not token_ids:
            return FinishReason.NONE
        sampling = self._sampling
        ends = set(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            ends |= set(facts.eos_token_ids)
        if token_ids[-1] in ends and len(token_ids) > sampling.min_tokens:
            return FinishReason.STOP
        if len(token_ids) >= sampling.max_tokens:
            return FinishReason.LENGTH
        return FinishReason.NONE
