"""What steps, prefill tokens and copies of blocks cost on this executor, as measured.

    step  =  base  +  tokens x time of a token  +  blocks to and from the host x time of one

Tokens are those of prefill, and draft tokens, which are computed like them. Base is the mean of the
steps without prefill, less the time of their drafts, whatever decodes in them; what a step with
prefill takes beyond it is the time of its tokens. Copies are timed by the executor: only what the
step waited for them counts, so what overlaps with the model costs nothing.

What becomes of the blocks that a victim filled and gave up is measured too, when it is back: they
lie untouched on the device, and cost nothing; or they come from the host tier; or they are gone and
computed again. Where there is a host tier, and prefixes are found again at all, all are expected to
come from there until something else was seen; where there is none, to be gone.

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
# Blocks of victims that are back: few, for a host tier that was roomy is full a moment later.
_WINDOW_RETURNED_BLOCKS = 256


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
        shares_prefixes: Whether what was given up can be found again.

    Attributes:
        num_steps: Steps observed. What follows is a guess while there are none.
        last_token_ns: What one token cost in the last step; 0 if it had no prefill.
        last_block_ns: What one block moved to or from the host cost in it, likewise.
    """

    def __init__(self, facts: ReplicaFacts, *, shares_prefixes: bool = True) -> None:
        self._shares_prefixes = shares_prefixes
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
        self._is_kept = self._shares_prefixes and facts.num_host_blocks > 0
        self._moved_share = _share_of_blocks(float(self._is_kept))
        self._gone_share = _share_of_blocks(float(not self._is_kept))
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
    def moved_share(self) -> float:
        """Of the full blocks that victims gave up, the part that came from the host tier again."""
        return self._moved_share.value

    @property
    def gone_share(self) -> float:
        """Of the full blocks that victims gave up, the part that had to be computed again."""
        return self._gone_share.value

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

    def observe_return(self, num_blocks: int, *, moved_share: float, gone_share: float) -> None:
        """A victim that gave up ``num_blocks`` full blocks is back.

        Args:
            num_blocks: Those that were its own.
            moved_share: The part of them that came from the host tier.
            gone_share: The part that was computed again; what is left lay on the device.
        """
        # A mean forgets what was before an observation, not the observation: one huge victim must
        # not outweigh all that come behind it.
        weight = min(num_blocks, _WINDOW_RETURNED_BLOCKS)
        if weight > 0:
            self._moved_share.add(moved_share * weight, weight)
            self._gone_share.add(gone_share * weight, weight)

    def observe_nothing(self, num_blocks: int) -> None:
        """A victim is back of whose ``num_blocks`` full blocks none had to be looked for.

        What was seen of others fades for what is expected at first. Else a recovery that looks dear
        once would not be chosen again, and so never be seen to have become cheap.
        """
        self.observe_return(
            num_blocks, moved_share=float(self._is_kept), gone_share=float(not self._is_kept)
        )


def _share_of_blocks(prior: float) -> Average:
    return Average(prior, prior_weight=_PRIOR_NUM_BLOCKS, window=_WINDOW_RETURNED_BLOCKS)
