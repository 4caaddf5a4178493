"""One request between its arrival at the gateway and its end.

Nothing here waits, so whoever has many of them moves each on by a call, and needs no task for it.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from pageframe.core.clock import Clock
from pageframe.core.errors import PageframeError
from pageframe.core.replica import ReplicaFacts
from pageframe.core.request import Completion, Delivery, Submission
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import FinishReason
from pageframe.gateway.assembler import OutputAssembler
from pageframe.gateway.attribution import GatewayTimes, attribute
from pageframe.gateway.detokenizer import SilentDetokenizer
from pageframe.gateway.mailbox import Mailbox, Pending
from pageframe.gateway.metering import GatewayMeter, RequestTimes
from pageframe.gateway.output import Header, Output, RatesLeft
from pageframe.gateway.ranking import RankingAssembler
from pageframe.gateway.request import GenerateInput
from pageframe.gateway.sample_stream import SampleStream
from pageframe.gateway.stop_strings import StopAutomaton
from pageframe.gateway.tokenizer import TextCodec
from pageframe.gateway.tracing import GenerateTrace


class Link(Protocol):
    """What is needed of the stream to the scheduler."""

    @property
    def facts(self) -> ReplicaFacts:
        """What the replica serves; raises UnavailableError before it is known."""
        ...

    @property
    def served(self) -> Sequence[ReplicaFacts]:
        """What all replicas serve, one for each model; nothing before it is known."""
        ...

    def submit(self, submission: Submission, mailbox: Mailbox) -> int:
        """Send a request; returns its handle."""
        ...

    def cancel(self, handle: int, sample_index: int | None = None) -> None:
        """Take back a request or one of its samples; nothing happens if it has ended."""
        ...


class RunningRequest:
    """Everything that belongs to one request, and nothing that outlives it.

    Args:
        request: As asked for.
        request_id: Its name, given or made.
        trace: Its ``generate`` span.
        link: To the scheduler.
        clock: Source of time.
        meter: Counts what leaves.
        leave: Called once it keeps no place any more, perhaps twice.

    Attributes:
        request: As asked for.
        request_id: Its name, given or made.
        trace: Its ``generate`` span.
        mailbox: Where its tokens arrive.
        opening: What its caller is told first: the header, and all of a request that had ended
            already.
    """

    def __init__(
        self,
        request: GenerateInput,
        request_id: str,
        trace: GenerateTrace,
        *,
        link: Link,
        clock: Clock,
        meter: GatewayMeter,
        leave: Callable[["RunningRequest"], None],
    ) -> None:
        self.request = request
        self.request_id = request_id
        self.trace = trace
        trace.name(request_id, request.tenant)
        self.mailbox = Mailbox()
        self.opening: list[Output] = []
        self._link = link
        self._clock = clock
        self._meter = meter
        self._leave = leave
        self._handle = 0
        self._has_ended = False
        self._assembler = OutputAssembler((), request.delivery)
        self._streams: list[SampleStream] = []
        self._sampling = request.sampling
        self._num_prompt_tokens = 0
        self._times = GatewayTimes(trace.start_ns)
        # Of a caller that gets everything at the end, the times between say nothing.
        is_final = request.delivery is Delivery.FINAL
        self._output_times = None if is_final else RequestTimes(trace.start_ns)

    @property
    def is_done(self) -> bool:
        """Whether every sample has ended, and all there is to tell was given out."""
        return self._assembler.is_done

    def begin(
        self,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        codec: TextCodec | None,
        facts: ReplicaFacts,
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
        self._assembler = OutputAssembler(self._streams, request.delivery)
        if request.is_ranked and request.beams is None:
            self._assembler = RankingAssembler(
                self._streams,
                request.num_samples,
                tells_logprobs=request.sampling.num_logprobs >= 0,
            )
        self.trace.describe(request, sampling, facts.model)
        self.opening = [self._header(facts.model), *self._resume(facts)]

    def submit(self, submission: Submission) -> None:
        """Hand it to the scheduler.

        Raises:
            PageframeError: refused there, or there is no scheduler.
        """
        self._times.submit_ns = self._clock.now_ns()
        self._handle = self._link.submit(submission, self.mailbox)
        # It knows no stop strings and would go on behind one; other ends it sees by itself.
        for sample_index, stream in enumerate(self._streams):
            if stream.is_stopped:
                self._link.cancel(self._handle, sample_index)

    def advance(self) -> list[Output]:
        """Take what has gathered in the mailbox; returns what there is to tell.

        Accounts of samples that end are complete.

        Raises:
            PageframeError: the request has failed.
        """
        now_ns = self._clock.now_ns()
        mailbox = self.mailbox
        pending = mailbox.take()
        self._times.lost_ns = mailbox.lost_ns
        for part in pending.values():
            if part.completion is not None:
                part.completion = attribute(part.completion, self._times, now_ns)
        if self._output_times is not None:
            self._meter.take(self._output_times, pending, now_ns)
        outputs, stopped = self._assembler.accept(pending, mailbox.prompt_logprobs)
        for sample_index in stopped:
            self._link.cancel(self._handle, sample_index)
        if levels := mailbox.take_rates():
            outputs.insert(0, RatesLeft(levels))
        return outputs

    def give_up(self, error: PageframeError) -> None:
        """Its caller reads nothing: free its places; it hears of it when it reads again."""
        self._let_go()
        self.mailbox.fail(error)

    def end(self, error: BaseException | None) -> None:
        """Take back what is left of it, and record how it ended; only the first call counts.

        Args:
            error: What ended it; None when it ended well.
        """
        if self._has_ended:
            return
        self._has_ended = True
        self._let_go()
        ends = [self._assembler.ends[index] for index in sorted(self._assembler.ends)]
        if ends and self.is_done:
            # A consumer that stops asking behind the last output has had all of it.
            error = None
        self.trace.place(self.mailbox.replica, self.mailbox.num_moves)
        self.trace.end(self._num_prompt_tokens, ends, error)
        elapsed_ns = self._clock.now_ns() - self.trace.start_ns
        completions = [end.completion for end in ends]
        self._meter.end(self.request.tenant, completions, elapsed_ns, error)

    def _let_go(self) -> None:
        if self._handle:
            self._link.cancel(self._handle)
        self._leave(self)

    def _header(self, model: str) -> Header:
        return Header(
            request_id=self.request_id,
            seed=self._sampling.seed,
            trace_id=self.trace.trace_id.hex(),
            num_prompt_tokens=self._num_prompt_tokens,
            model=model,
        )

    def _resume(self, facts: ReplicaFacts) -> list[Output]:
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
        return self._assembler.accept(ends, [])[0]

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
