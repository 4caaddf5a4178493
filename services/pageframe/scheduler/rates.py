"""What steps, prefill tokens and copies of blocks cost on this executor, as measured.

    step  =  base  +  tokens x time of a token  +  blocks to and from the host x time of one

Tokens are those of prefill, and draft tokens, which are computed like them. Base is the mean of the
steps without prefill, less the time of their drafts, whatever decodes in them; what a step with
prefill takes beyond it is the time of its tokens. Copies are timed by the executor: only what the
step waited for them counts, so what overlaps with the model costs nothing.

Every figure is a mean that forgets: a quantity as old as one window counts 1/e. Before anything was
measured there is a prior with the weight of a few observations; it is on the dear side.
"""

import math

from pageframe.core.replica import ReplicaFacts
from pageframe.core.step import StepResult

_WINDOW_STEPS = 64
_WINDOW_TOKENS = 16_384
_WINDOW_BLOCKS = 4_096
# An 8B model on one large GPU prefills some 20,000 tokens a second.
_PRIOR_TOKEN_NS = 50_000.0
_PRIOR_NUM_TOKENS = 128
# The first step that is measured says more than no step at all.
_PRIOR_NUM_STEPS = 0.01
# Two fifths of what PCIe 4 x16 carries; pageable memory is slower than pinned.
_PRIOR_COPY_BYTES_PER_NS = 10.0
_PRIOR_NUM_BLOCKS = 8


class Average:
    """A mean that forgets, weighted by how much was observed.

    Args:
        prior: Its value before anything was observed.
        prior_weight: How much that counts, in units of what is observed.
        window: What counts 1/e once so much more was observed.
    """

    def __init__(self, prior: float, *, prior_weight: float, window: float) -> None:
        self._total = prior * prior_weight
        self._weight = prior_weight
        self._window = window

    @property
    def value(self) -> float:
        """The mean."""
        return self._total / self._weight

    def add(self, total: float, weight: float) -> None:
        """Observe ``weight`` units that came to ``total`` together; the weight is above 0."""
        kept = math.exp(-weight / self._window)
        self._total = self._total * kept + total
        self._weight = self._weight * kept + weight


class Rates:
    """Costs of one executor; nanoseconds throughout.

    Args:
        facts: Of the executor; the size of a block is where the prior of a copy comes from.

    Attributes:
        num_steps: Steps observed. What follows is a guess while there are none.
        last_token_ns: What one token cost in the last step; 0 if it had no prefill.
        last_block_ns: What one block moved to or from the host cost in it, likewise.
    """

    def __init__(self, facts: ReplicaFacts) -> None:
        self.restart(facts)

    def restart(self, facts: ReplicaFacts) -> None:
        """Another executor: nothing is known of it."""
        token_bytes = facts.kv_bytes_per_token // facts.num_kv_groups
        block_bytes = max(1, token_bytes * facts.block_size)
        self._base = Average(0.0, prior_weight=_PRIOR_NUM_STEPS, window=_WINDOW_STEPS)
        self._token = Average(
            _PRIOR_TOKEN_NS, prior_weight=_PRIOR_NUM_TOKENS, window=_WINDOW_TOKENS
        )
        self._block = Average(
            block_bytes / _PRIOR_COPY_BYTES_PER_NS,
            prior_weight=_PRIOR_NUM_BLOCKS,
            window=_WINDOW_BLOCKS,
        )
        self._paid_share = Average(1.0, prior_weight=_PRIOR_NUM_TOKENS, window=_WINDOW_TOKENS)
        self.num_steps = 0
        self.last_token_ns = 0.0
        self.last_block_ns = 0.0

    @property
    def base_ns(self) -> float:
        """A step without prefill, drafts and copies."""
        return self._base.value

    @property
    def token_ns(self) -> float:
        """One token of prefill, or of a draft, more in a step."""
        return self._token.value

    @property
    def block_ns(self) -> float:
        """One block more that a step moves to the host or from there."""
        return self._block.value

    @property
    def paid_share(self) -> float:
        """What victims that lost all had to pay, in parts of the price of all their tokens.

        Less than 1 as far as they find again what they lost, on the device or in the host tier.
        """
        return self._paid_share.value

    def step_ns(self, num_prefill_tokens: int) -> float:
        """A step that prefills so many tokens beside what decodes these days."""
        return self.base_ns + num_prefill_tokens * self.token_ns

    def observe(self, result: StepResult) -> None:
        """Learn from an applied step. Costs as much as the step had entries, not decodes."""
        timing = result.timing
        # An entry of one token is a decode that somebody asked for.
        num_drafted = sum(result.num_drafted)
        num_prefill_tokens = sum(
            end - first
            for end, first in zip(result.num_computed, result.first_positions, strict=True)
            if end - first > 1
        )
        step_ns = timing.end_ns - timing.start_ns - timing.copy_ns
        self.last_token_ns = self.last_block_ns = 0.0
        if timing.num_blocks_moved:
            self._block.add(timing.copy_ns, timing.num_blocks_moved)
            self.last_block_ns = timing.copy_ns / timing.num_blocks_moved
        if num_prefill_tokens > 0:
            num_tokens = num_prefill_tokens + num_drafted
            tokens_ns = max(0.0, step_ns - self.base_ns)
            self._token.add(tokens_ns, num_tokens)
            self.last_token_ns = tokens_ns / num_tokens
        elif result.sampled_ids:
            self._base.add(max(0.0, step_ns - num_drafted * self.token_ns), 1)
        self.num_steps += 1

    def observe_return(self, spent_ns: float, num_lost: int) -> None:
        """A victim that was to recompute ``num_lost`` tokens is back, and that is what it cost."""
        if num_lost > 0 and self.token_ns > 0:
            self._paid_share.add(spent_ns / self.token_ns, num_lost)
