"""The life of a request at the gateway, whatever door it came through.

    check ─▶ tokenise ─▶ submit ─▶ header ─▶ (mailbox ─▶ detokenise ─▶ delta)* ─▶ ends
    ╰────────── start ─────────╯             ╰─────────── advance ───────────╯

Nothing here outlives the caller's stream: when the consumer of ``generate`` goes away, in whatever
state, the request is taken back from the scheduler at once.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import replace

from pageframe.core.clock import Clock
from pageframe.core.errors import (
    AlreadyExistsError,
    CancelledError,
    InvalidRequestError,
    NotFoundError,
    PageframeError,
    ResourceExhaustedError,
    UnavailableError,
)
from pageframe.core.grammar import Grammar
from pageframe.core.limits import LIMITS
from pageframe.core.replica import ReplicaFacts
from pageframe.core.request import Delivery, Submission
from pageframe.core.sampling import SamplingParams
from pageframe.core.trace import TraceSink
from pageframe.gateway.chat import ChatMessage
from pageframe.gateway.codec_store import CodecStore
from pageframe.gateway.grammar_checks import GrammarChecks
from pageframe.gateway.mailbox import Mailbox
from pageframe.gateway.metering import GatewayMeter
from pageframe.gateway.output import Output
from pageframe.gateway.prompt import encode_prompt
from pageframe.gateway.request import GenerateInput
from pageframe.gateway.running import Link, RunningRequest
from pageframe.gateway.tokenizer import TextCodec
from pageframe.gateway.tracing import GenerateTrace
from pageframe.gateway.turns import WriteTurns
from pageframe.gateway.unread import UNREAD_S, ReadWatch
from pageframe.gateway.validation import (
    check_input,
    check_token_ids,
    find_model,
    resolve_sampling,
)
from pageframe.rpc.auth import Authenticator
from pageframe.telemetry.context import TraceContext, span_id_to_bytes
from pageframe.telemetry.metrics import Reading

# With stop strings no more tokens than this are computed in vain behind one (see DELIVERY_FINAL).
_NUM_TOKENS_PER_EVENT = 8


class GenerationService:
    """All that the gateway does, free of gRPC.

    Args:
        link: To the scheduler.
        codecs: Tokenisers.
        authenticator: For salts.
        clock: Source of time.
        sink: Takes spans.
        unread_s: How long output may wait to be read before its request is given up, seconds.
    """

    def __init__(
        self,
        link: Link,
        codecs: CodecStore,
        authenticator: Authenticator,
        clock: Clock,
        sink: TraceSink,
        *,
        unread_s: float = UNREAD_S,
    ) -> None:
        self._link = link
        self._codecs = codecs
        self._grammars = GrammarChecks()
        self._authenticator = authenticator
        self._clock = clock
        self._sink = sink
        self._unread_s = unread_s
        self._living: dict[tuple[str, str], Mailbox] = {}
        self._turns = WriteTurns()
        self._meter = GatewayMeter()
        self._idle = asyncio.Event()
        self._is_draining = False

    @property
    def facts(self) -> ReplicaFacts:
        """What the replica serves, of several the first; raises UnavailableError before that."""
        return self._link.facts

    @property
    def served(self) -> Sequence[ReplicaFacts]:
        """What all replicas serve, one for each model; raises UnavailableError before that."""
        return self._link.served or (self._link.facts,)

    def facts_of(self, model: str) -> ReplicaFacts:
        """What serves a model; an empty name stands for the first.

        Raises:
            NotFoundError: reason UNKNOWN_MODEL.
            UnavailableError: reason NOT_READY.
        """
        return find_model(model, self.served)

    async def generate(
        self, request: GenerateInput, parent: TraceContext | None = None
    ) -> AsyncGenerator[Output, None]:
        """Run one request; yields a header, rates if any, deltas, and an end for each sample.

        Close the iterator (``contextlib.aclosing``) to take the request back. Tokens that arrive
        before its next turn at writing are merged.

        Raises:
            PageframeError: refused, failed, cancelled or too late.
        """
        running = await self.start(request, parent)
        watch = self.watch(running.give_up)
        error: BaseException | None = None
        try:
            for output in running.opening:
                yield output
            while not running.is_done:
                await running.mailbox.wait()
                watch.offer()
                async with self._turns.turn():
                    for output in running.advance():
                        watch.offer()
                        yield output
                    watch.taken()
        except BaseException as caught:
            error = caught
            raise
        finally:
            watch.close()
            running.end(error)

    async def start(
        self, request: GenerateInput, parent: TraceContext | None = None
    ) -> RunningRequest:
        """Check, tokenise and submit a request; for those who move many on by themselves.

        Whoever gets it tells what it has to tell (``opening``, then ``advance`` whenever its
        mailbox is filled until it is done), and ends it.

        Raises:
            PageframeError: refused.
        """
        running = RunningRequest(
            request,
            request.request_id or uuid.uuid4().hex,
            GenerateTrace(self._sink, self._clock, parent),
            link=self._link,
            clock=self._clock,
            meter=self._meter,
            leave=self._leave,
        )
        try:
            self._register(running)
            await self._submit(running)
        except BaseException as error:
            running.end(error)
            raise
        return running

    def watch(self, give_up: Callable[[PageframeError], None]) -> ReadWatch:
        """Watch a caller that may read nothing for too long; ``give_up`` is told why."""
        return ReadWatch(self._unread_s, lambda: give_up(_unread(self._unread_s)))

    def cancel(self, tenant: str, request_id: str) -> None:
        """End a living request with CANCELLED.

        Raises:
            NotFoundError: reason UNKNOWN_REQUEST; no such request of this tenant lives here.
        """
        mailbox = self._living.get((tenant, request_id))
        if mailbox is None:
            raise NotFoundError(
                "UNKNOWN_REQUEST",
                f"no request {request_id[:200]!r} of tenant {tenant!r} lives at this gateway",
            )
        mailbox.fail(CancelledError("CANCELLED", "the request was cancelled by its tenant"))

    async def check_grammar(self, grammar: Grammar) -> None:
        """Refuse a grammar that no output can be held to; one that was checked costs nothing.

        Raises:
            InvalidRequestError: GRAMMAR_INVALID, with the library's words, or GRAMMAR_TOO_COMPLEX.
        """
        await self._grammars.check(grammar)

    async def tokenize(
        self, model: str, text: str | None, messages: Sequence[ChatMessage] | None
    ) -> list[int]:
        """Token ids of a text or a chat, as ``generate`` would make them.

        Raises:
            PageframeError: as ``generate`` would.
        """
        facts = self.facts_of(model)
        if (text is None) == (messages is None):
            raise InvalidRequestError("EMPTY_PROMPT", "give text or a chat", num_inputs=0)
        codec = await self._codecs.get(facts)
        return await encode_prompt(codec, text, messages, facts)

    async def detokenize(
        self, model: str, token_ids: Sequence[int], *, skip_special_tokens: bool
    ) -> str:
        """The text of token ids.

        Raises:
            PageframeError: unknown model, or a token id out of range.
        """
        facts = self.facts_of(model)
        check_token_ids("token_ids", token_ids, facts.vocab_size)
        codec = await self._codecs.get(facts)
        return codec.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def readings(self) -> Iterator[Reading]:
        """What is counted here, for metrics."""
        return self._meter.read(len(self._living))

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused because the process is about to end."""
        return self._is_draining

    async def codec(self, model: str) -> TextCodec | None:
        """The tokeniser of a model; None for one without a model folder.

        Raises:
            NotFoundError: reason UNKNOWN_MODEL.
            PreconditionError: the folder holds no usable tokeniser.
        """
        return await self._codecs.find(self.facts_of(model))

    async def load(self) -> None:
        """Load the tokenisers ahead of the first request.

        Raises:
            PreconditionError: a model's folder holds no usable tokeniser.
        """
        for facts in self.served:
            await self._codecs.find(facts)

    async def drain(self) -> None:
        """Refuse new requests from now on; return when the last one has ended."""
        self._is_draining = True
        while self._living:
            self._idle.clear()
            await self._idle.wait()

    def _register(self, running: RunningRequest) -> None:
        """Keep the request's name among the living until it leaves."""
        if self._is_draining:
            raise UnavailableError("DRAINING", "this gateway is shutting down; try another one")
        if len(self._living) >= LIMITS.num_requests_per_gateway_max:
            raise ResourceExhaustedError(
                "TOO_MANY_REQUESTS",
                f"{len(self._living)} requests live at this gateway; that is all it takes",
                num_requests=len(self._living),
                num_requests_max=LIMITS.num_requests_per_gateway_max,
            )
        key = (running.request.tenant, running.request_id)
        if key in self._living:
            raise AlreadyExistsError(
                "REQUEST_EXISTS", f"a request {running.request_id[:200]!r} is living"
            )
        self._living[key] = running.mailbox

    def _leave(self, running: RunningRequest) -> None:
        """Give back its place, unless that was done already."""
        key = (running.request.tenant, running.request_id)
        if self._living.get(key) is running.mailbox:
            del self._living[key]
        if not self._living:
            self._idle.set()

    async def _submit(self, running: RunningRequest) -> None:
        request = running.request
        facts = self.facts_of(request.model)
        check_input(request, facts, self._clock.now_ns())
        codec = await self._codecs.find(facts)
        with running.trace.tokenizing():
            if request.sampling.grammar is not None:
                await self.check_grammar(request.sampling.grammar)
            prompt_token_ids = await self._prompt(request, codec, facts)
        sampling = resolve_sampling(request, len(prompt_token_ids), facts)
        running.begin(prompt_token_ids, sampling, codec, facts)
        if not running.is_done:
            running.submit(self._submission(running, prompt_token_ids, sampling, facts.model))

    async def _prompt(
        self, request: GenerateInput, codec: TextCodec | None, facts: ReplicaFacts
    ) -> list[int]:
        if request.token_ids is not None:
            return list(request.token_ids)
        return await encode_prompt(
            codec or await self._codecs.get(facts),
            request.text,
            request.messages,
            facts,
            request.tools,
        )

    def _submission(
        self,
        running: RunningRequest,
        prompt_token_ids: list[int],
        sampling: SamplingParams,
        model: str,
    ) -> Submission:
        request, trace = running.request, running.trace
        delivery = request.delivery
        if delivery is Delivery.FINAL and request.stop:
            # Somebody has to look for the stop strings while tokens are made.
            delivery = Delivery.COALESCED
        if request.is_ranked and request.beams is None:
            # That is by what outputs are ranked, whether or not the caller wants to see it.
            sampling = replace(sampling, num_logprobs=max(0, sampling.num_logprobs))
        return Submission(
            handle=0,
            request_id=running.request_id,
            prompt_token_ids=prompt_token_ids,
            sampling=sampling,
            resume_token_ids=[list(token_ids) for token_ids in request.resume_token_ids],
            num_samples=request.num_sampled,
            beams=request.beams,
            delivery=delivery,
            num_tokens_per_event_max=(
                _NUM_TOKENS_PER_EVENT if delivery is Delivery.COALESCED else 1
            ),
            deadline_ns=request.deadline_ns,
            priority=request.priority,
            tenant=request.tenant,
            cache_salt=self._authenticator.cache_salt(request.tenant),
            session_id=request.session_id,
            prefix_handle=request.prefix_handle,
            trace_id=trace.trace_id,
            span_id=span_id_to_bytes(trace.span_id) if trace.trace_id else b"",
            arrival_ns=trace.start_ns,
            model=model,
        )


def _unread(unread_s: float) -> PageframeError:
    return ResourceExhaustedError(
        "OUTPUT_NOT_READ",
        f"nothing was read for {unread_s:g} s though output was there; the request was given up",
        unread_s=unread_s,
    )
