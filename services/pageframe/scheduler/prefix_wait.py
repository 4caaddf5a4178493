"""Holding a sequence back while another one computes the same prefix (law 5).

    leader      [── computed ──)[── to compute ──)│
    follower    [─ cached ─)[──── would compute ──)│   shared up to here: num_leader_tokens

The wait ends when the leader has computed what they share, when it runs no longer, or when the
follower would be there sooner by itself. Both go at the pace of whole steps: the leader at that of
its newest chunk, the follower at that of the token budget that is left.
"""

from pageframe.core.units import ceil_div
from pageframe.scheduler.budget import PlanBuilder
from pageframe.scheduler.roster import Roster
from pageframe.scheduler.sequence import Knowledge, Sequence


class PrefixWait:
    """Knows for whom a sequence should wait.

    Args:
        roster: Who runs.
        is_enabled: Whether the executor shares prefixes at all.
    """

    def __init__(self, roster: Roster, *, is_enabled: bool) -> None:
        self._roster = roster
        self._is_enabled = is_enabled

    def leader_of(self, builder: PlanBuilder, sequence: Sequence) -> Sequence | None:
        """Who computes a prefix of ``sequence`` and is worth waiting for, if somebody is.

        While the executor has not answered the announcement that is a guess, see ``prefixes``: one
        step of waiting tells.
        """
        is_untold = not sequence.output and sequence.submission.sampling.num_prompt_logprobs >= 0
        if not self._is_enabled or is_untold:
            # Log-probabilities of a prompt are computed with it; nothing of it can be shared.
            return None
        if sequence.knowledge is not Knowledge.KNOWN:
            return self._roster.prefixes.find(sequence)
        if not sequence.leader_id:
            return None
        leader = self._roster.running.get(sequence.leader_id)
        if leader is not None and leader.num_computed >= sequence.num_leader_tokens:
            num_shared = min(sequence.num_leader_tokens, sequence.num_tokens - 1)
            sequence.num_cached_tokens = max(sequence.num_cached_tokens, num_shared)
            leader = None
        if leader is None or self._is_quicker_alone(builder, sequence, leader):
            sequence.leader_id = 0
            return None
        return leader

    def _is_quicker_alone(self, builder: PlanBuilder, sequence: Sequence, leader: Sequence) -> bool:
        num_shared = sequence.num_leader_tokens
        num_tokens_own = max(1, num_shared - sequence.num_cached_tokens)
        num_steps_own = ceil_div(num_tokens_own, builder.num_chunk_tokens_max)
        num_tokens_led = num_shared - leader.num_computed
        return ceil_div(num_tokens_led, max(1, leader.last_chunk_tokens)) > num_steps_own
