"""What gateways and the scheduler tell each other: submissions one way, token events the other."""

import enum
from dataclasses import dataclass, field

from pageframe.core.beams import BeamParams
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import FinishReason, SequenceAccount, TokenLogprobs


@enum.unique
class Delivery(enum.IntEnum):
    """When tokens leave the scheduler. Values equal those of ``pageframe.v1.Delivery``."""

    EVERY_TOKEN = 1
    COALESCED = 2
    FINAL = 3


@enum.unique
class StallCause(enum.IntEnum):
    """What a request waited for. Values equal those of ``pageframe.v1.StallCause``."""

    QUEUE = 1
    KV_FULL = 2
    TOKEN_BUDGET = 3
    QUOTA = 4
    PREFIX_WAIT = 5
    PREEMPTED = 6
    SWAP_IN = 7
    EXECUTOR = 8
    EXECUTOR_LOST = 9
    TRANSPORT = 10
    UNEXPLAINED = 11


@dataclass(slots=True, kw_only=True)
class Submission:
    """One request, tokenised and checked, as a gateway hands it to the scheduler.

    Attributes:
        handle: The gateway's short name for the request on this stream; token events use it.
        request_id: Name of the request in spans, logs and ``Cancel``; unique among the living.
        prompt_token_ids: At least one token.
        resume_token_ids: Output the caller already has, per sample (empty for a fresh request).
        num_samples: How many sequences to sample, each with its own sample index from 0; of a beam
            search, how many outputs to return.
        sampling: Sampling parameters, shared by all samples.
        delivery: When to send tokens.
        num_tokens_per_event_max: Under ``COALESCED``: flush when this many are waiting.
        deadline_ns: Absolute, nanoseconds since the Unix epoch; 0 for none.
        priority: Higher runs earlier; 0 is normal.
        tenant: From authentication.
        cache_salt: From the tenant.
        beams: A search instead of samples; None samples.
        session_id: Turns of one chat carry one id; empty for none.
        prefix_handle: A retained prefix with which the prompt begins; empty for none.
        trace_id: W3C trace id, 16 bytes; empty when not traced.
        span_id: Span id of the gateway's ``generate`` span, 8 bytes.
        arrival_ns: When the gateway took the request.
        is_resubmitted: Whether it was sent before, on a stream that was lost.
        model: Name of the model; a gateway chooses a scheduler by it and does not tell it on.
    """

    handle: int
    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    resume_token_ids: list[list[int]] = field(default_factory=list)
    num_samples: int = 1
    delivery: Delivery = Delivery.EVERY_TOKEN
    num_tokens_per_event_max: int = 1
    deadline_ns: int = 0
    priority: int = 0
    tenant: str = ""
    cache_salt: bytes = b""
    beams: BeamParams | None = None
    session_id: str = ""
    prefix_handle: str = ""
    trace_id: bytes = b""
    span_id: bytes = b""
    arrival_ns: int = 0
    is_resubmitted: bool = False
    model: str = ""

    @property
    def num_running(self) -> int:
        """Sequences that run at once for each that waits for it."""
        return 1 if self.beams is None else self.beams.num_beams

    @property
    def num_sequences(self) -> int:
        """Sequences that wait for it: one for each sample; a search is one, whatever its beams."""
        return 1 if self.beams is not None else self.num_samples


@dataclass(slots=True, kw_only=True)
class Completion:
    """How one sample of a request ended, with its memory account.

    ``error_reason`` and ``error_message`` are set when ``finish_reason`` is ERROR or DEADLINE.

    Attributes:
        stall_ns: Waiting time by cause.
        compute_ns: Time in which its own work was done: steps that computed its tokens, and, once
            a gateway has seen it, reading and tokenising the request.
        elapsed_ns: From the request's arrival to its last output, filled in by the gateway; then
            it is the sum of the two above.
        submit_ns: When the scheduler took it, nanoseconds since the Unix epoch.
        end_ns: When its last token was known, or when it was ended otherwise.
        score: Of an output of a beam search, or of the best of several samples; None else.
        num_unreturned_tokens: Tokens that were computed for samples or beams that are not returned;
            told with sample 0.
    """

    handle: int
    sample_index: int
    finish_reason: FinishReason
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    account: SequenceAccount = field(default_factory=SequenceAccount)
    stall_ns: dict[StallCause, int] = field(default_factory=dict)
    compute_ns: int = 0
    elapsed_ns: int = 0
    submit_ns: int = 0
    end_ns: int = 0
    score: float | None = None
    num_unreturned_tokens: int = 0
    error_status: str = ""
    error_reason: str = ""
    error_message: str = ""
    error_limits: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RateLevel:
    """How full the bucket of one rate is.

    Attributes:
        num_per_minute: The rate, and what fits in.
        num_left: Whole units that are in it.
        full_after_ns: Until it is full, if nothing more is asked for.
    """

    num_per_minute: int
    num_left: int
    full_after_ns: int


RateLevels = dict[str, RateLevel]
"""Of one tenant, by what is counted: ``requests``, ``tokens``; what has no rate is missing."""


@dataclass(slots=True, kw_only=True)
class TokenEvents:
    """All that one gateway must hear after one step; parallel arrays over (request, sample).

    Attributes:
        step: The step that made the tokens; 0 for events outside a step.
        handles: Which request.
        sample_indices: Which of its samples.
        num_tokens: How many of ``token_ids`` belong to it.
        token_ids: Tokens of all entries, one after the other.
        logprobs: One per token of ``token_ids``, where a request asked for them, by index.
        prompt_logprobs: By handle, sent once.
        completions: Samples that ended; an entry's last tokens come in the same or an earlier
            message.
        rates: Levels behind a request that was just let in, by handle; for tenants with rates.
    """

    step: int
    handles: list[int] = field(default_factory=list)
    sample_indices: list[int] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    completions: list[Completion] = field(default_factory=list)
    rates: dict[int, RateLevels] = field(default_factory=dict)

    @classmethod
    def merge(cls, parts: "list[TokenEvents]") -> "TokenEvents":
        """One message that says what ``parts`` say, in order; ``parts`` must not be used again."""
        merged = parts[0]
        for part in parts[1:]:
            shift = len(merged.token_ids)
            merged.handles += part.handles
            merged.sample_indices += part.sample_indices
            merged.num_tokens += part.num_tokens
            merged.token_ids += part.token_ids
            for index, logprobs in part.logprobs.items():
                merged.logprobs[shift + index] = logprobs
            merged.prompt_logprobs.update(part.prompt_logprobs)
            merged.completions += part.completions
            merged.rates.update(part.rates)
            merged.step = part.step or merged.step
        return merged

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to send."""
        return not (self.handles or self.completions or self.prompt_logprobs or self.rates)
