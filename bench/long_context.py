"""Chats of 32k tokens on a pool that holds two of them: ``python -m bench.long_context``.

A tiny model with random weights is asked by several chats, each of which fills its context in two
turns. Twice:

    roomy     a pool that holds all chats, nothing shared, no host tier: every turn is computed from
              its first token. Its tokens are the reference, its second turns the price of recompute
    tiered    a pool that holds two chats, and a host tier that holds all. All first turns come at
              once; then the second turns, one after the other, whose blocks have left the device
              meanwhile and come back by promotion

Both go through the real scheduler and the real engine in one thread, in chunks of ``--chunk``
tokens. Tokens have to be equal; with ``--check`` those of the first chat also to Hugging Face's.
Time to first token runs from the submission of a turn to its first token.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from pageframe.core.clock import SystemClock
from pageframe.core.request import Delivery, Submission
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import StepResult
from pageframe.core.trace import KvCause, KvOperation, NullTraceSink
from pageframe.core.units import ceil_div
from pageframe.executor.engine import StepEngine
from pageframe.executor.memory.retaining import SessionTimes
from pageframe.executor.model.loader import load_runner
from pageframe.scheduler.core import Scheduler

_VOCAB_SIZE = 499
_SEED = 20260923
_NUM_CHATS_IN_POOL = 2
# A turn is over when its chat is idle: the next chat wants the room.
_IDLE_NS = 1
_TTL_NS = 3600 * 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of model and chats; tokens unless it says otherwise.

    Attributes:
        num_context_tokens: Both turns of a chat with their answers.
        num_turn_tokens: What the second turn adds to the first turn and its answer.
        num_new_tokens: Of each answer.
        num_chats: Chats.
        chunk_tokens: Of a prompt in one step.
        block_size: Tokens per block.
        num_layers: Of the model.
        num_heads: Query heads.
        num_kv_heads: Heads of keys and values.
        head_dim: Of each.
    """

    num_context_tokens: int
    num_turn_tokens: int
    num_new_tokens: int
    num_chats: int
    chunk_tokens: int
    block_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def num_first_tokens(self) -> int:
        """Of the first turn's prompt."""
        return self.num_context_tokens - self.num_turn_tokens - 2 * self.num_new_tokens

    @property
    def num_blocks_per_chat(self) -> int:
        """To hold all of it."""
        return ceil_div(self.num_context_tokens, self.block_size)


@dataclass(slots=True, kw_only=True)
class Turn:
    """One turn of one chat.

    Attributes:
        num_prompt_tokens: What it was asked, with all that went before.
        token_ids: Its answer.
        logprobs: Natural log-probability of each.
        first_token_s: Seconds from its submission to its first token.
        num_computed: Prompt tokens that were computed for it.
    """

    num_prompt_tokens: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    first_token_s: float = 0.0
    num_computed: int = 0


class MovesCounter(NullTraceSink):
    """Counts blocks by what happened to them."""

    def __init__(self) -> None:
        self.num_blocks: dict[str, int] = {}

    def kv(
        self, operation: KvOperation, cause: KvCause, *, block_ids: Sequence[int], **_: Any
    ) -> None:
        """Count; ``PROMOTE``, for example."""
        name = operation.name
        self.num_blocks[name] = self.num_blocks.get(name, 0) + len(block_ids)


class Service:
    """Scheduler and engine in one thread, over a model of its own."""

    def __init__(
        self,
        folder: Path,
        shape: Shape,
        *,
        num_blocks: int,
        num_host_slots: int,
        has_prefix_cache: bool,
    ) -> None:
        self.moves = MovesCounter()
        self._clock = SystemClock()
        self._num_asked = 0
        runner = load_runner(
            str(folder),
            dtype="float32",
            device="cpu",
            max_num_sequences=shape.num_chats,
            max_step_tokens=shape.chunk_tokens + shape.num_chats,
        )
        self._engine = StepEngine(
            runner,
            num_blocks=num_blocks,
            block_size=shape.block_size,
            max_num_sequences=shape.num_chats,
            max_step_tokens=shape.chunk_tokens + shape.num_chats,
            max_model_len=shape.num_context_tokens,
            trace=self.moves,
            clock=self._clock,
            num_host_slots=num_host_slots,
            has_prefix_cache=has_prefix_cache,
            session_times=SessionTimes(idle_ns=_IDLE_NS, ttl_ns=_TTL_NS),
        )
        runner.warm_up()
        self._scheduler = Scheduler(
            self._engine.describe("bench"),
            token_budget=shape.chunk_tokens + shape.num_chats,
            max_num_running=shape.num_chats,
            prefill_chunk_tokens=shape.chunk_tokens,
            lookahead=True,
            shares_prefixes=has_prefix_cache,
            trace=NullTraceSink(),
            clock=self._clock,
        )

    def ask(
        self, chats: Sequence[str], prompts: Sequence[list[int]], max_tokens: int
    ) -> list[Turn]:
        """One turn of each of ``chats``, all at once; returns when all are answered."""
        turns = [Turn(num_prompt_tokens=len(prompt)) for prompt in prompts]
        first_handle = self._num_asked
        self._num_asked += len(prompts)
        started_s = time.perf_counter()
        for place, (chat, prompt) in enumerate(zip(chats, prompts, strict=True)):
            self._scheduler.submit(
                Submission(
                    handle=first_handle + place,
                    request_id=f"{chat}, request {first_handle + place}",
                    prompt_token_ids=prompt,
                    sampling=SamplingParams(
                        temperature=0.0, max_tokens=max_tokens, ignore_eos=True, num_logprobs=0
                    ),
                    delivery=Delivery.EVERY_TOKEN,
                    session_id=chat,
                ),
                gateway_id=1,
            )
        self._run(turns, first_handle, started_s)
        assert self._engine.check_integrity() == []
        return turns

    def close(self) -> None:
        """Give back weights and pools."""
        self._engine.close()

    def _run(self, turns: list[Turn], first_handle: int, started_s: float) -> None:
        engine, scheduler, clock = self._engine, self._scheduler, self._clock
        plans = []
        place_of: dict[int, int] = {}
        while not scheduler.is_idle:
            while (plan := scheduler.plan(clock.now_ns())) is not None:
                plans.append(plan)
                for announcement in plan.announce:
                    handle = int(announcement.request_id.split()[-1])
                    place_of[announcement.sequence_id] = handle - first_handle
            due_ns = engine.desk.next_due_ns
            if due_ns and due_ns <= clock.now_ns() and engine.desk.pass_time() and not plans:
                # As the executor's thread does: no result will tell of it.
                told = StepResult(step=0, account=engine.account())
                scheduler.on_result(told, clock.now_ns())
                continue
            assert plans, "nothing is planned and nothing is done"
            result = engine.step(plans.pop(0))
            assert engine.last_failure is None, engine.last_failure
            now_s = time.perf_counter() - started_s
            for sequence_id, end, start in zip(
                result.computed_ids, result.num_computed, result.first_positions, strict=True
            ):
                turn = turns[place_of[sequence_id]]
                turn.num_computed += max(0, min(end, turn.num_prompt_tokens) - start)
            for place, sequence_id in enumerate(result.sampled_ids):
                turn = turns[place_of[sequence_id]]
                turn.first_token_s = turn.first_token_s or now_s
                turn.token_ids.append(result.token_ids[place])
                turn.logprobs.append(result.logprobs[place].logprob)
            scheduler.on_result(result, clock.now_ns())


@dataclass(slots=True, kw_only=True)
class Answers:
    """Both turns of every chat, and how many blocks moved for each."""

    first: list[Turn]
    second: list[Turn]
    first_s: float
    first_moves: dict[str, int]
    second_moves: dict[str, int]


def build_model(shape: Shape, folder: Path) -> None:
    """Save a Llama of random weights, drawn so wide that rounding decides no greedy choice."""
    torch.manual_seed(_SEED)
    hidden_size = 2 * shape.num_heads * shape.head_dim
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(
            vocab_size=_VOCAB_SIZE,
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            max_position_embeddings=shape.num_context_tokens,
            initializer_range=0.3,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )
    )
    model.save_pretrained(folder)


def make_prompts(shape: Shape) -> tuple[list[list[int]], list[list[int]]]:
    """Random tokens: of each chat's first turn, and what its second turn adds to it."""
    generator = torch.Generator().manual_seed(_SEED)

    def draw(num_tokens: int) -> list[int]:
        return torch.randint(3, _VOCAB_SIZE, (num_tokens,), generator=generator).tolist()

    return (
        [draw(shape.num_first_tokens) for _ in range(shape.num_chats)],
        [draw(shape.num_turn_tokens) for _ in range(shape.num_chats)],
    )


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


def ask_hugging_face(shape: Shape, folder: Path) -> list[list[int]]:
    """Its greedy answers to both turns of the first chat."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    first_prompts, additions = make_prompts(shape)
    token_ids: list[int] = []
    answers = []
    for added in (first_prompts[0], additions[0]):
        token_ids += added
        with torch.inference_mode():
            output = model.generate(
                torch.tensor([token_ids]),
                attention_mask=torch.ones(1, len(token_ids), dtype=torch.int64),
                max_new_tokens=shape.num_new_tokens,
                do_sample=False,
            )
        answers.append(output[0, len(token_ids) :].tolist())
        token_ids += answers[-1]
    return answers


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


def main() -> int:
    """Measure, print, write JSON where asked for; 1 when tokens differ."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    shape = Shape(
        num_context_tokens=arguments.context,
        num_turn_tokens=arguments.turn_tokens,
        num_new_tokens=arguments.new_tokens,
        num_chats=arguments.chats,
        chunk_tokens=arguments.chunk,
        block_size=arguments.block_size,
        num_layers=arguments.layers,
        num_heads=arguments.heads,
        num_kv_heads=arguments.kv_heads,
        head_dim=arguments.head_dim,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_model(shape, folder)
        roomy, tiered = measure(shape, folder)
        report = {"shape": asdict(shape), "machine": _machine(arguments.threads)}
        report |= summarise(roomy, tiered)
        is_equal = bool(report["tokens_equal"])
        if arguments.check:
            own = [tiered.first[0].token_ids, tiered.second[0].token_ids]
            report["equals_hugging_face"] = own == ask_hugging_face(shape, folder)
            is_equal &= bool(report["equals_hugging_face"])
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    return 0 if is_equal else 1


def _machine(num_threads: int) -> dict[str, object]:
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "cpu": models[0] if models else platform.machine(),
        "num_threads": num_threads,
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.long_context", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--context", type=int, default=32768, metavar="TOKENS")
    parser.add_argument("--turn-tokens", type=int, default=256, metavar="TOKENS")
    parser.add_argument("--new-tokens", type=int, default=16, metavar="TOKENS")
    parser.add_argument("--chats", type=int, default=8)
    parser.add_argument("--chunk", type=int, default=2048, metavar="TOKENS")
    parser.add_argument("--block-size", type=int, default=16, metavar="TOKENS")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--kv-heads", type=int, default=1)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--check", action="store_true", help="ask Hugging Face as well")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
