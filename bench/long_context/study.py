"""The same chats in a pool for all and in a pool for two, and what differs."""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from bench.long_context.chats import Shape, make_prompts
from bench.long_context.service import Service, Turn

_NUM_CHATS_IN_POOL = 2


@dataclass(slots=True, kw_only=True)
class Answers:
    """Both turns of every chat, and how many blocks moved for each."""

    first: list[Turn]
    second: list[Turn]
    first_s: float
    first_moves: dict[str, int]
    second_moves: dict[str, int]


def hold_chats(service: Service, shape: Shape, *, all_at_once: bool) -> Answers:
    """Both turns of every chat; the second turns never side by side."""
    first_prompts, additions = make_prompts(shape)
    chats = [f"chat-{index}" for index in range(shape.num_chats)]
    num_new = shape.num_new_tokens
    started_s = time.perf_counter()
    if all_at_once:
        first = service.ask(chats, first_prompts, num_new)
    else:
        first = [
            service.ask([chat], [prompt], num_new)[0]
            for chat, prompt in zip(chats, first_prompts, strict=True)
        ]
    first_s = time.perf_counter() - started_s
    first_moves = dict(service.moves.num_blocks)
    service.moves.num_blocks.clear()
    second = [
        service.ask([chat], [prompt + turn.token_ids + addition], num_new)[0]
        for chat, prompt, turn, addition in zip(chats, first_prompts, first, additions, strict=True)
    ]
    return Answers(
        first=first,
        second=second,
        first_s=first_s,
        first_moves=first_moves,
        second_moves=dict(service.moves.num_blocks),
    )


def measure(shape: Shape, folder: Path) -> tuple[Answers, Answers]:
    """The roomy run and the tiered one."""
    num_blocks_in_all = shape.num_chats * shape.num_blocks_per_chat
    answers = []
    for has_tier in (False, True):
        service = Service(
            folder,
            shape,
            num_blocks=(
                _NUM_CHATS_IN_POOL * shape.num_blocks_per_chat if has_tier else num_blocks_in_all
            ),
            num_host_slots=num_blocks_in_all if has_tier else 0,
            has_prefix_cache=has_tier,
        )
        answers.append(hold_chats(service, shape, all_at_once=has_tier))
        service.close()
    return answers[0], answers[1]


def summarise(roomy: Answers, tiered: Answers) -> dict[str, object]:
    """The figures, and whether all tokens are equal."""
    pairs = list(zip([*roomy.first, *roomy.second], [*tiered.first, *tiered.second], strict=True))
    recompute_s = [turn.first_token_s for turn in roomy.second]
    promotion_s = [turn.first_token_s for turn in tiered.second]
    return {
        "tokens_equal": all(one.token_ids == other.token_ids for one, other in pairs),
        "logprob_error_max": max(
            abs(a - b)
            for one, other in pairs
            for a, b in zip(one.logprobs, other.logprobs, strict=True)
        ),
        "first_turns_s": {"roomy": roomy.first_s, "tiered": tiered.first_s},
        "first_token_s": {"recompute": recompute_s, "promotion": promotion_s},
        "first_token_median_s": {
            "recompute": statistics.median(recompute_s),
            "promotion": statistics.median(promotion_s),
        },
        "first_token_ratio": statistics.median(promotion_s) / statistics.median(recompute_s),
        "second_turn_tokens_computed": {
            "recompute": [turn.num_computed for turn in roomy.second],
            "promotion": [turn.num_computed for turn in tiered.second],
        },
        "blocks_moved": {"first turns": tiered.first_moves, "second turns": tiered.second_moves},
    }
