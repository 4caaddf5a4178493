"""What a caller may ask of the gateway, and what becomes of it.

    GenerateInput ──check_input──▶ (refused, with the numbers)
                  ──tokenise────▶ token ids ──resolve──▶ Submission, without a handle yet

``GenerateInput`` keeps what was left open open (``None``); a ``Submission`` has no open field.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from pageframe.core.beams import BeamParams
from pageframe.core.request import Delivery
from pageframe.core.sampling import SamplingParams
from pageframe.gateway.chat import ChatMessage, Tool


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateInput:
    """One generation as asked for, not yet checked.

    Attributes:
        model: Name of the model; empty for the one that is served.
        text: Plain text to continue. Exactly one of ``text``, ``messages`` and ``token_ids`` is
            not None.
        messages: A chat to continue.
        tools: What the model of a chat may call.
        token_ids: Token ids to continue.
        sampling: How tokens are chosen; its ``seed`` and ``max_tokens`` mean nothing.
        seed: First word of the random key; None lets the gateway pick one.
        max_tokens: Output ends after this many tokens; None for as many as there is room for.
        num_samples: How many outputs to return.
        best_of: How many sequences to sample, of which the best are returned; None for as many.
        beams: A search instead of samples; None samples.
        stop: Output ends before the first of these strings.
        include_stop: Leave the stop string in the text.
        delivery: When to send tokens.
        request_id: The caller's name for the request; empty to have one made.
        resume_token_ids: Output of a broken stream that the caller has, one entry for each sample;
            empty for a fresh request.
        session_id: Names a chat whose blocks are kept for the next turn; empty for none.
        prefix_handle: Names a retained prefix with which the prompt begins; empty for none.
        priority: Higher runs earlier; 0 is normal.
        skip_special_tokens: Leave special tokens out of the text.
        deadline_ns: Absolute, nanoseconds since the Unix epoch; 0 for none.
        tenant: From authentication.
    """

    model: str = ""
    text: str | None = None
    messages: Sequence[ChatMessage] | None = None
    tools: Sequence[Tool] = ()
    token_ids: Sequence[int] | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int | None = None
    max_tokens: int | None = None
    num_samples: int = 1
    best_of: int | None = None
    beams: BeamParams | None = None
    stop: Sequence[str] = ()
    include_stop: bool = False
    delivery: Delivery = Delivery.EVERY_TOKEN
    request_id: str = ""
    resume_token_ids: Sequence[Sequence[int]] = ()
    session_id: str = ""
    prefix_handle: str = ""
    priority: int = 0
    skip_special_tokens: bool = True
    deadline_ns: int = 0
    tenant: str = "default"

    @property
    def num_sampled(self) -> int:
        """Outputs that the scheduler makes: samples, or those of a search that are returned."""
        if self.beams is not None:
            return self.beams.num_return
        return self.num_samples if self.best_of is None else self.best_of

    @property
    def is_ranked(self) -> bool:
        """Whether nothing is known to be returned before all is known."""
        return self.beams is not None or self.num_sampled > self.num_samples
