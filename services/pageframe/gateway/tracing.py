"""The ``generate`` span of one request, and its ``tokenize`` child."""

import contextlib
from collections.abc import Iterator

import structlog

from pageframe.core.clock import Clock
from pageframe.core.errors import PageframeError
from pageframe.core.limits import LIMITS
from pageframe.core.request import Completion
from pageframe.core.sampling import SamplingParams
from pageframe.core.trace import AttributeValue, NullTraceSink, TraceSink
from pageframe.core.units import NANOSECONDS_PER_MILLISECOND
from pageframe.gateway.output import SampleEnd
from pageframe.gateway.request import GenerateInput
from pageframe.telemetry import spans
from pageframe.telemetry.context import TraceContext, new_span_id, new_trace_id

_log = structlog.get_logger(__name__)


class GenerateTrace:
    """Gathers what the span says; records it when the request ends.

    Attributes:
        trace_id: 16 bytes; empty when nothing is traced.
        span_id: Of the ``generate`` span.
        start_ns: When the request arrived.
    """

    def __init__(self, sink: TraceSink, clock: Clock, parent: TraceContext | None) -> None:
        """Begin a span under the caller's, or a trace of its own."""
        self._sink = sink
        self._clock = clock
        self._is_traced = not isinstance(sink, NullTraceSink)
        self._parent_span_id = 0 if parent is None else parent.span_id
        self._attributes: dict[str, AttributeValue] = {spans.GEN_AI_OPERATION_NAME: "generate"}
        self.start_ns = clock.now_ns()
        trace_id = new_trace_id() if parent is None else parent.trace_id
        self.trace_id = trace_id if self._is_traced else b""
        self.span_id = new_span_id()

    def name(self, request_id: str, tenant: str) -> None:
        """Say whose it is, before anything is refused; a name that is too long is cut."""
        self._attributes |= {
            spans.REQUEST_ID: request_id[: LIMITS.request_id_bytes_max],
            spans.TENANT: tenant,
        }

    @contextlib.contextmanager
    def tokenizing(self) -> Iterator[None]:
        """Measure the block as the ``tokenize`` span."""
        start_ns = self._clock.now_ns()
        try:
            yield
        finally:
            if self._is_traced:
                self._sink.span(
                    spans.TOKENIZE,
                    trace_id=self.trace_id,
                    span_id=new_span_id(),
                    parent_span_id=self.span_id,
                    start_ns=start_ns,
                    end_ns=self._clock.now_ns(),
                    attributes={},
                )

    def describe(self, request: GenerateInput, sampling: SamplingParams, model: str) -> None:
        """Say what was asked for."""
        self._attributes |= {
            spans.PRIORITY: request.priority,
            spans.GEN_AI_REQUEST_MODEL: model,
            spans.GEN_AI_REQUEST_MAX_TOKENS: sampling.max_tokens,
            spans.GEN_AI_REQUEST_TEMPERATURE: sampling.temperature,
            spans.GEN_AI_REQUEST_TOP_K: sampling.top_k,
            spans.GEN_AI_REQUEST_TOP_P: sampling.top_p,
            spans.GEN_AI_REQUEST_FREQUENCY_PENALTY: sampling.frequency_penalty,
            spans.GEN_AI_REQUEST_PRESENCE_PENALTY: sampling.presence_penalty,
            # Span attributes are signed 64-bit numbers; a seed is unsigned.
            spans.GEN_AI_REQUEST_SEED: str(sampling.seed),
            spans.GEN_AI_REQUEST_CHOICE_COUNT: request.num_samples,
        }
        if request.best_of is not None:
            self._attributes[spans.BEST_OF] = request.best_of
        if request.beams is not None:
            self._attributes[spans.NUM_BEAMS] = request.beams.num_beams
            self._attributes[spans.GEN_AI_REQUEST_CHOICE_COUNT] = request.beams.num_return
        if request.stop:
            self._attributes[spans.GEN_AI_REQUEST_STOP_SEQUENCES] = list(request.stop)

    def place(self, replica: str, num_moves: int) -> None:
        """Say which replica ran it, and how often it went to another one before."""
        if replica:
            self._attributes |= {spans.REPLICA: replica, spans.REPLICA_MOVES: num_moves}

    def end(
        self, num_prompt_tokens: int, ends: list[SampleEnd], error: BaseException | None
    ) -> None:
        """Record the span and a log line: what the samples cost and how the request ended."""
        completions = [end.completion for end in ends]
        num_cached_tokens = max((item.num_cached_tokens for item in completions), default=0)
        num_output_tokens = sum(item.num_output_tokens for item in completions)
        end_ns = self._clock.now_ns()
        _log.info(
            "generate",
            trace_id=self.trace_id.hex(),
            span_id=f"{self.span_id:016x}",
            request_id=self._attributes.get(spans.REQUEST_ID, ""),
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=num_output_tokens,
            duration_ms=(end_ns - self.start_ns) / NANOSECONDS_PER_MILLISECOND,
            error=_error_text(error),
        )
        if not self._is_traced:
            return
        self._attributes |= {
            spans.GEN_AI_USAGE_INPUT_TOKENS: num_prompt_tokens,
            spans.GEN_AI_USAGE_OUTPUT_TOKENS: num_output_tokens,
            spans.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS: num_cached_tokens,
            spans.GEN_AI_RESPONSE_FINISH_REASONS: [end.finish_reason.name.lower() for end in ends],
            **_account_of(completions),
            **({spans.ERROR_TYPE: _error_type(error)} if error is not None else {}),
        }
        self._sink.span(
            spans.GENERATE,
            trace_id=self.trace_id,
            span_id=self.span_id,
            parent_span_id=self._parent_span_id,
            start_ns=self.start_ns,
            end_ns=end_ns,
            attributes=self._attributes,
            error=_error_text(error),
        )


def _account_of(completions: list[Completion]) -> dict[str, AttributeValue]:
    """Where the time went, of the sample that ended last: it is the one that was waited for."""
    last = max(completions, key=lambda item: item.elapsed_ns, default=None)
    if last is None or not last.elapsed_ns:
        return {}
    waited = {
        spans.STALL_MS.format(cause.name.lower()): waited_ns / NANOSECONDS_PER_MILLISECOND
        for cause, waited_ns in last.stall_ns.items()
    }
    return {
        spans.ELAPSED_MS: last.elapsed_ns / NANOSECONDS_PER_MILLISECOND,
        spans.COMPUTE_MS: last.compute_ns / NANOSECONDS_PER_MILLISECOND,
        **waited,
    }


def _error_text(error: BaseException | None) -> str:
    if error is None:
        return ""
    if isinstance(error, PageframeError):
        return str(error)
    return f"{_error_type(error)}: {type(error).__name__}"


def _error_type(error: BaseException) -> str:
    # What ends a request without a typed error is the end of the caller's stream.
    return error.reason if isinstance(error, PageframeError) else "CLIENT_GONE"
