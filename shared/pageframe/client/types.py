"""What a client asks and hears, free of protobuf."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pageframe.core.beams import BeamParams
from pageframe.core.grammar import Grammar
from pageframe.core.request import Delivery, StallCause
from pageframe.core.step import FinishReason, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat.

    Attributes:
        role: ``system``, ``user``, ``assistant`` or what else the model's template knows.
        content: What is said.
    """

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One generation. What is left at None is the server's choice.

    Attributes:
        prompt: Text to continue. Exactly one of ``prompt``, ``messages`` and ``token_ids``.
        messages: A chat to continue.
        token_ids: Token ids to continue.
        model: Name of the model; empty for the one that is served.
        temperature: In ``[0, 100]``; 0 takes the best token; None is 1.
        top_k: Keep this many best tokens; 0 keeps all.
        top_p: Keep the smallest set that reaches this probability, in ``(0, 1]``; None is 1.
        min_p: Drop tokens below this share of the best one's probability, in ``[0, 1]``.
        repetition_penalty: In ``(0, 100]``; None is 1, which is off.
        presence_penalty: In ``[-100, 100]``.
        frequency_penalty: In ``[-100, 100]``.
        seed: First word of the random key, in ``[0, 2**64)``; None has one picked.
        logit_bias: Token id to a number in ``[-100, 100]`` that is added to its logit.
        num_logprobs: Best tokens to report for each output token; None reports nothing.
        num_prompt_logprobs: The same for the prompt.
        stop_token_ids: Output ends after one of these.
        ignore_eos: Go on after the model's own end.
        min_tokens: No end before this many tokens.
        max_tokens: Output ends after this many; None for as many as there is room for.
        num_samples: Outputs to return, in ``[1, 64]``.
        best_of: Sequences to sample, of which the most probable are returned, best first; at least
            ``num_samples``, at most 64; None for as many.
        beam_search: Search for the most probable outputs instead of sampling; goes without
            ``num_samples``.
        stop: Output ends before the first of these strings.
        include_stop: Leave the stop string in the text.
        delivery: When tokens are sent; None for each as soon as it is known, or at the end where
            outputs are ranked.
        request_id: Name of the request; empty to have one made.
        resume_token_ids: Output of a broken stream of one sample; needs ``seed`` unless greedy.
        resume_outputs: The same for any number of samples, one entry for each; goes without
            ``resume_token_ids``.
        session_id: Names a chat whose blocks are kept for its next turn, at most 256 bytes.
        prefix_handle: Names a retained prefix with which the prompt begins, at most 256 bytes.
        priority: Higher runs earlier; 0 is normal.
        keep_special_tokens: Leave special tokens in the text.
        grammar: What the output has to be, a JSON Schema or a regular expression; None for any
            text.
    """

    prompt: str | None = None
    messages: Sequence[Message] | None = None
    token_ids: Sequence[int] | None = None
    model: str = ""
    temperature: float | None = None
    top_k: int = 0
    top_p: float | None = None
    min_p: float = 0.0
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = None
    num_samples: int = 1
    best_of: int | None = None
    beam_search: BeamParams | None = None
    stop: Sequence[str] = ()
    include_stop: bool = False
    delivery: Delivery | None = None
    request_id: str = ""
    resume_token_ids: Sequence[int] = ()
    resume_outputs: Sequence[Sequence[int]] = ()
    session_id: str = ""
    prefix_handle: str = ""
    priority: int = 0
    keep_special_tokens: bool = False
    grammar: Grammar | None = None

    @property
    def num_outputs(self) -> int:
        """Samples of the result."""
        return self.num_samples if self.beam_search is None else self.beam_search.num_return

    @property
    def is_ranked(self) -> bool:
        """Whether outputs are ranked, so that none is known before all are."""
        return self.beam_search is not None or (self.best_of or 0) > self.num_samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """Comes first.

    Attributes:
        request_id: Name of the request.
        seed: First word of the random key that is used.
        trace_id: 32 hexadecimal digits; empty when not traced.
        num_prompt_tokens: Tokens of the prompt.
        model: Name of the model.
    """

    request_id: str
    seed: int
    trace_id: str
    num_prompt_tokens: int
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """New output of one sample.

    Attributes:
        sample_index: Which sample.
        text: New text; may be empty.
        token_ids: New tokens.
        logprobs: One for each token, where asked for.
        prompt_logprobs: With the first delta of sample 0, where asked for.
    """

    sample_index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryAccount:
    """What one sample cost.

    Attributes:
        num_prompt_tokens: Tokens of the prompt.
        num_cached_tokens: Of those, found in the prefix cache.
        num_completion_tokens: Tokens of the output.
        num_blocks_peak: Most blocks held at one time.
        num_blocks_shared: Blocks used without being allocated.
        num_copies_on_write: Blocks copied because of a write into a shared one.
        num_preemptions: How often it lost its blocks.
        num_blocks_saved: Blocks that did not have to be allocated thanks to sharing.
        num_draft_tokens: Tokens guessed ahead and checked.
        num_accepted_tokens: Those of them that were right.
        num_unreturned_tokens: Tokens computed for samples or beams that are not returned; told with
            sample 0.
        stall_ns: Nanoseconds waited, by cause.
        compute_ns: Nanoseconds in which its own work was done.
        elapsed_ns: Nanoseconds from its arrival to its last output: the sum of both.
    """

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_completion_tokens: int = 0
    num_blocks_peak: int = 0
    num_blocks_shared: int = 0
    num_copies_on_write: int = 0
    num_preemptions: int = 0
    num_blocks_saved: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_unreturned_tokens: int = 0
    stall_ns: Mapping[StallCause, int] = field(default_factory=dict)
    compute_ns: int = 0
    elapsed_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The end of one sample.

    Attributes:
        sample_index: Which sample.
        finish_reason: Why it ended.
        stop: The stop string that ended it, or empty.
        account: What it cost.
        score: By what outputs were ranked; None where they were not.
    """

    sample_index: int
    finish_reason: FinishReason
    stop: str
    account: MemoryAccount
    score: float | None = None


Event = Started | Delta | Finished


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The whole output of one sample.

    Attributes:
        text: Its text.
        token_ids: Its tokens.
        finish_reason: Why it ended.
        stop: The stop string that ended it, or empty.
        account: What it cost.
        logprobs: One for each token, where asked for.
        score: By what outputs were ranked; None where they were not.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop: str
    account: MemoryAccount
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    score: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """A whole generation.

    Attributes:
        started: Header.
        samples: By sample index.
        prompt_logprobs: Where asked for.
    """

    started: Started
    samples: list[Sample]
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model that is served.

    Attributes:
        name: Its name.
        max_model_len: Most tokens of one sequence, prompt and output together.
        vocab_size: Number of token ids.
        block_size: Tokens per block of its pool.
        num_blocks: Blocks of its pool.
        eos_token_ids: Tokens that end a sequence.
        dtype: Type of weights.
        kv_dtype: Type of keys and values.
    """

    name: str
    max_model_len: int
    vocab_size: int
    block_size: int
    num_blocks: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    kv_dtype: str


def collect(events: Sequence[Event]) -> GenerationResult:
    """Put the events of one whole generation together."""
    started = next(event for event in events if isinstance(event, Started))
    ends = sorted(
        (event for event in events if isinstance(event, Finished)),
        key=lambda event: event.sample_index,
    )
    deltas = [event for event in events if isinstance(event, Delta)]
    samples = []
    for end in ends:
        own = [delta for delta in deltas if delta.sample_index == end.sample_index]
        samples.append(
            Sample(
                text="".join(delta.text for delta in own),
                token_ids=[token_id for delta in own for token_id in delta.token_ids],
                finish_reason=end.finish_reason,
                stop=end.stop,
                account=end.account,
                logprobs=[entry for delta in own for entry in delta.logprobs],
                score=end.score,
            )
        )
    return GenerationResult(
        started=started,
        samples=samples,
        prompt_logprobs=[entry for delta in deltas for entry in delta.prompt_logprobs],
    )
