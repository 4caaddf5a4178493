"""What narrower keys and values cost in answers: ``python -m bench.kv_dtype [MODEL_FOLDER]``.

Weights and activations are float32 throughout; only the type in which keys and values are kept
changes, and float32 is what the others are compared with. Two measurements on real conversations
(first exchange of each, in the model's chat template):

    read      the reply is given to the model, token by token of the truth: perplexity of the reply,
              how far its log-probabilities moved, and how often the best token stayed the best
    written   the model answers by itself, greedily: how many of its tokens are those that it
              writes with float32. One token that differs changes all that follow it

Every key and value that is read went through the pool, also those of the token's own chunk.
"""

import argparse
import json
import math
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoTokenizer

from bench.paper.sharegpt import find_dataset, read_exchanges
from pageframe.core.sampling import SamplingParams
from pageframe.core.step import TokenLogprobs
from pageframe.core.units import ceil_div
from pageframe.executor.batch import ModelRunner, StepBatch, StepOutput
from pageframe.executor.model.loader import load_runner

KV_DTYPES = ("float32", "bfloat16", "float16", "int8", "fp8")
_MODEL = "smollm2-135m-instruct"
_BLOCK_SIZE = 16
# Longer conversations are cut here, so that all types are through in minutes.
_NUM_TOKENS_MAX = 512
_NUM_PROMPT_TOKENS_MAX = 256
_NUM_REPLY_TOKENS_MIN = 16
_NUM_SEQUENCES_AT_ONCE = 25
_SEED = 20260912

Advance = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Token ids of a prompt in the chat template, and of the reply that followed."""

    prompt: list[int]
    reply: list[int]


@dataclass(slots=True)
class Answers:
    """What one type of keys and values led to.

    Attributes:
        kv_bytes_per_token: Of the pool, scales included.
        read: For each conversation, what the model thought of each reply token.
        written: For each conversation, the greedy tokens.
        read_s: Time that reading took, in seconds.
        write_s: Time that writing took, prompts included.
    """

    kv_bytes_per_token: int
    read: list[list[TokenLogprobs]]
    written: list[list[int]]
    read_s: float
    write_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One line of the table; shares are in [0, 1], log-probabilities natural."""

    kv_dtype: str
    kv_bytes_per_token: int
    perplexity: float
    logprob_error_mean: float
    logprob_error_p99: float
    best_token_share: float
    greedy_token_share: float
    greedy_tokens_before_difference: float
    greedy_equal_sequences: int
    read_s: float
    write_s: float


def main() -> None:
    """Measure, print a table, write JSON where asked for."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    folder = arguments.folder or _prepare(_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    conversations = choose_conversations(tokenizer, arguments.conversations)
    answers: dict[str, Answers] = {}
    with Progress(console=Console(stderr=True)) as progress:
        for kv_dtype in ("float32", *(name for name in arguments.kv_dtypes if name != "float32")):
            num_steps = len(conversations) + arguments.new_tokens * ceil_div(
                len(conversations), _NUM_SEQUENCES_AT_ONCE
            )
            task = progress.add_task(kv_dtype, total=num_steps)
            answers[kv_dtype] = measure(
                folder,
                kv_dtype,
                conversations,
                arguments.new_tokens,
                lambda task=task: progress.advance(task),
            )
    eos = set(tokenizer.all_special_ids)
    comparisons = [compare(name, answers[name], answers["float32"], eos) for name in answers]
    _print_table(comparisons, conversations, arguments.new_tokens)
    if arguments.json:
        report = _report(comparisons, conversations, arguments)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def choose_conversations(tokenizer: Any, num_conversations: int) -> list[Conversation]:
    """First exchanges at random but repeatable, cut to the limits above."""
    exchanges = read_exchanges(find_dataset())
    chosen: list[Conversation] = []
    for index in np.random.default_rng(_SEED).permutation(len(exchanges)):
        exchange = exchanges[index]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": exchange.prompt}],
            tokenize=False,
            add_generation_prompt=True,
        )
        prompt = tokenizer.encode(text, add_special_tokens=False)
        if len(prompt) > _NUM_PROMPT_TOKENS_MAX:
            continue
        reply = tokenizer.encode(exchange.reply, add_special_tokens=False)
        reply = reply[: _NUM_TOKENS_MAX - len(prompt)]
        if len(reply) >= _NUM_REPLY_TOKENS_MIN:
            chosen.append(Conversation(prompt, reply))
        if len(chosen) == num_conversations:
            break
    return chosen


def measure(
    folder: Path,
    kv_dtype: str,
    conversations: Sequence[Conversation],
    num_new_tokens: int,
    advance: Advance,
) -> Answers:
    """Let the model read and write with keys and values kept as ``kv_dtype``."""
    runner = load_runner(
        str(folder), dtype="float32", kv_dtype=kv_dtype, max_step_tokens=_NUM_TOKENS_MAX
    )
    num_blocks_each = ceil_div(
        max(_NUM_TOKENS_MAX, _NUM_PROMPT_TOKENS_MAX + num_new_tokens), _BLOCK_SIZE
    )
    runner.allocate_pool(_NUM_SEQUENCES_AT_ONCE * num_blocks_each, _BLOCK_SIZE)
    runner.warm_up()
    steps = _Steps(runner, num_blocks_each)
    started_s = time.perf_counter()
    read = []
    for conversation in conversations:
        read.append(steps.read(conversation))
        advance()
    read_s = time.perf_counter() - started_s
    started_s = time.perf_counter()
    written: list[list[int]] = []
    for first in range(0, len(conversations), _NUM_SEQUENCES_AT_ONCE):
        together = conversations[first : first + _NUM_SEQUENCES_AT_ONCE]
        written += steps.write([entry.prompt for entry in together], num_new_tokens, advance)
    answers = Answers(
        kv_bytes_per_token=runner.facts.kv_bytes_per_token,
        read=read,
        written=written,
        read_s=read_s,
        write_s=time.perf_counter() - started_s,
    )
    runner.close()
    return answers


class _Steps:
    """Runs steps; row ``r`` has the blocks ``[r * W, (r + 1) * W)`` for good, dirty as they are."""

    def __init__(self, runner: ModelRunner, num_blocks_each: int) -> None:
        self._runner = runner
        rows = np.arange(_NUM_SEQUENCES_AT_ONCE, dtype=np.int32)[:, None]
        self._tables = rows * num_blocks_each + np.arange(num_blocks_each, dtype=np.int32)

    def read(self, conversation: Conversation) -> list[TokenLogprobs]:
        """What the model thinks of each token of the reply, given those before."""
        token_ids = conversation.prompt + conversation.reply
        # Log-probabilities of a prompt: the whole conversation is one.
        self._admit(0, token_ids, SamplingParams(temperature=0.0, num_prompt_logprobs=1))
        output = self._execute([token_ids], [0])
        self._runner.release(0)
        # The first token has none.
        return output.prompt_logprobs[0][len(conversation.prompt) - 1 :]

    def write(
        self, prompts: Sequence[list[int]], num_new_tokens: int, advance: Advance
    ) -> list[list[int]]:
        """Greedy continuations of ``prompts``, side by side."""
        sampling = SamplingParams(temperature=0.0, max_tokens=num_new_tokens)
        for row, prompt in enumerate(prompts):
            self._admit(row, prompt, sampling)
        starts = [0] * len(prompts)
        pending = list(prompts)
        written: list[list[int]] = [[] for _ in prompts]
        for _ in range(num_new_tokens):
            output = self._execute(pending, starts)
            starts = [start + len(tokens) for start, tokens in zip(starts, pending, strict=True)]
            pending = [[token_id] for token_id in output.token_ids.tolist()]
            for tokens, new in zip(written, pending, strict=True):
                tokens += new
            advance()
        for row in range(len(prompts)):
            self._runner.release(row)
        return written

    def _admit(self, row: int, token_ids: list[int], sampling: SamplingParams) -> None:
        self._runner.admit(
            row,
            sampling=sampling,
            sample_index=0,
            token_ids=np.array(token_ids, np.int32),
            num_prompt_tokens=len(token_ids),
        )

    def _execute(self, new_tokens: Sequence[list[int]], starts: Sequence[int]) -> StepOutput:
        """Row ``r`` computes ``new_tokens[r]`` at positions from ``starts[r]``, and samples."""
        counts = [len(tokens) for tokens in new_tokens]
        rows = np.arange(len(counts), dtype=np.int32)
        positions = np.concatenate(
            [np.arange(start, start + n) for start, n in zip(starts, counts, strict=True)]
        )
        blocks = self._tables[np.repeat(rows, counts), positions // _BLOCK_SIZE]
        return self._runner.execute(
            StepBatch(
                step=1,
                num_decodes=counts.count(1),
                rows=rows,
                token_ids=np.concatenate(new_tokens).astype(np.int32),
                positions=positions.astype(np.int32),
                slots=blocks.astype(np.int64) * _BLOCK_SIZE + positions % _BLOCK_SIZE,
                query_start=np.cumsum([0, *counts]).astype(np.int32),
                context_lens=np.array(starts, np.int32) + np.array(counts, np.int32),
                block_tables=self._tables[rows],
                samples=rows,
                sample_rows=rows,
            )
        )


def compare(name: str, answers: Answers, exact: Answers, eos: set[int]) -> Comparison:
    """Put one type beside float32."""
    logprobs, exact_logprobs = _logprobs(answers), _logprobs(exact)
    errors = np.abs(logprobs - exact_logprobs)
    best, exact_best = _best_tokens(answers), _best_tokens(exact)
    num_equal, num_before, num_compared = [], [], []
    for tokens, exact_tokens in zip(answers.written, exact.written, strict=True):
        # What stands behind the end of an answer is no answer.
        ends = [place for place, token_id in enumerate(exact_tokens) if token_id in eos]
        length = ends[0] + 1 if ends else len(exact_tokens)
        same = np.array(tokens[:length]) == np.array(exact_tokens[:length])
        num_compared.append(length)
        num_equal.append(int(same.sum()))
        num_before.append(length if same.all() else int(same.argmin()))
    return Comparison(
        kv_dtype=name,
        kv_bytes_per_token=answers.kv_bytes_per_token,
        perplexity=math.exp(-float(logprobs.mean())),
        logprob_error_mean=float(errors.mean()),
        logprob_error_p99=float(np.quantile(errors, 0.99)),
        best_token_share=float((best == exact_best).mean()),
        greedy_token_share=sum(num_equal) / sum(num_compared),
        greedy_tokens_before_difference=sum(num_before) / len(num_before),
        greedy_equal_sequences=sum(
            before == length for before, length in zip(num_before, num_compared, strict=True)
        ),
        read_s=answers.read_s,
        write_s=answers.write_s,
    )


def _logprobs(answers: Answers) -> NDArray[np.float64]:
    return np.array([entry.logprob for reply in answers.read for entry in reply])


def _best_tokens(answers: Answers) -> NDArray[np.int64]:
    return np.array([entry.top_token_ids[0] for reply in answers.read for entry in reply])


def _print_table(
    comparisons: Sequence[Comparison], conversations: Sequence[Conversation], num_new_tokens: int
) -> None:
    num_reply_tokens = sum(len(entry.reply) for entry in conversations)
    table = Table(
        title=f"{len(conversations)} conversations, cut to {_NUM_TOKENS_MAX} tokens: "
        f"{num_reply_tokens} reply tokens read, up to {num_new_tokens} written each"
    )
    for heading in (
        "kv dtype",
        "bytes/token",
        "perplexity",
        "logprob error\nmean",
        "logprob error\n99 %",
        "best token\nsame",
        "greedy tokens\nsame",
        "tokens before\na difference",
        "answers\nequal",
        "read, s",
        "write, s",
    ):
        table.add_column(heading, justify="right")
    for entry in comparisons:
        table.add_row(
            entry.kv_dtype,
            str(entry.kv_bytes_per_token),
            f"{entry.perplexity:.4f}",
            f"{entry.logprob_error_mean:.5f}",
            f"{entry.logprob_error_p99:.5f}",
            f"{entry.best_token_share:.2%}",
            f"{entry.greedy_token_share:.2%}",
            f"{entry.greedy_tokens_before_difference:.1f}",
            f"{entry.greedy_equal_sequences}/{len(conversations)}",
            f"{entry.read_s:.1f}",
            f"{entry.write_s:.1f}",
        )
    Console(width=140).print(table)


def _report(
    comparisons: Sequence[Comparison],
    conversations: Sequence[Conversation],
    arguments: argparse.Namespace,
) -> dict[str, object]:
    return {
        "model": arguments.folder.name if arguments.folder else _MODEL,
        "num_conversations": len(conversations),
        "num_tokens_max": _NUM_TOKENS_MAX,
        "num_reply_tokens": sum(len(entry.reply) for entry in conversations),
        "num_new_tokens": arguments.new_tokens,
        "block_size": _BLOCK_SIZE,
        "num_threads": arguments.threads,
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "results": [asdict(entry) for entry in comparisons],
    }


def _prepare(name: str) -> Path:
    """The folder of a prepared model, preparing it first if need be."""
    command = ["pageframe", "model", "prepare", name]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Path(output.strip().splitlines()[-1])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.kv_dtype", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", nargs="?", type=Path, help=f"model; {_MODEL} if left out")
    parser.add_argument("--conversations", type=int, default=50)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--kv-dtypes", nargs="+", choices=KV_DTYPES, default=KV_DTYPES, metavar="DTYPE"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
