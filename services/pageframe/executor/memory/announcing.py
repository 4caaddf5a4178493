"""Taking a new sequence in: whether it can ever run, and how much of it is in memory already."""

import numpy as np

from pageframe.core.errors import InvalidRequestError, PageframeError
from pageframe.core.plan import Announcement
from pageframe.core.step import StepResult
from pageframe.executor.memory.kv_memory import KvMemory
from pageframe.executor.memory.options import StepBounds
from pageframe.executor.memory.retaining import check_handle


def know(memory: KvMemory, announcement: Announcement, result: StepResult) -> None:
    """Take a new sequence in, and answer how much of it is here or about to be."""
    sequence = memory.announce(announcement)
    match = memory.match(sequence)
    block_size, token_ids = memory.options.block_size, sequence.parked_tokens
    num_cached = match.num_tokens_in_all(block_size, len(token_ids))
    num_found = num_cached // block_size
    leader_id = num_led = 0
    if memory.options.has_prefix_cache:
        # Who computes a block computes it in all groups of layers: the first stands for them.
        keys = sequence.keys.up_to(len(token_ids), token_ids, block_size)[num_found:]
        leader_id, num_led = memory.leaders.find(keys)
        memory.leaders.lead(sequence.sequence_id, keys)
    num_shared = min((num_found + num_led) * block_size, len(token_ids) - 1)
    if num_shared <= num_cached:
        leader_id = num_shared = 0  # The newest token is computed whoever computed it before.
    result.announced_ids.append(sequence.sequence_id)
    result.num_cached_tokens.append(num_cached)
    result.leader_ids.append(leader_id)
    result.num_leader_tokens.append(num_shared if leader_id else 0)


def why_never(memory: KvMemory, announcement: Announcement, bounds: StepBounds) -> str | None:
    """Why an announced sequence can never run; None if it can."""
    if not _can_ever_run(announcement, bounds):
        return ""
    if announcement.sampling.grammar is not None and not bounds.takes_grammars:
        return "GRAMMAR_UNAVAILABLE"
    try:
        check_handle(memory, announcement)
    except PageframeError as error:
        return error.reason
    return None


def _can_ever_run(announcement: Announcement, bounds: StepBounds) -> bool:
    """Whether tokens and sampling are sound, and at least one more token may follow."""
    num_tokens, num_prompt_tokens = len(announcement.token_ids), announcement.num_prompt_tokens
    if not 1 <= num_prompt_tokens <= num_tokens or num_tokens >= bounds.max_model_len:
        return False
    if num_tokens - num_prompt_tokens >= announcement.sampling.max_tokens:
        return False
    try:
        announcement.sampling.validate(bounds.vocab_size)
    except InvalidRequestError:
        return False
    token_ids = np.asarray(announcement.token_ids, dtype=np.int64)
    return bool(token_ids.min() >= 0 and token_ids.max() < bounds.vocab_size)
