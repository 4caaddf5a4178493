"""What speculative decoding brings, and what it costs where it brings nothing.

    python -m bench.speculation [FOLDER] [--requests 8] [--tokens 64] [--json FILE]

The real scheduler and engine in one thread, over the embedded model or a model in FOLDER; the same
requests with and without drafts, in turns, greedily. Three kinds of text:

    copy   a text that is to be repeated word for word, as in an edit or a quotation
    code   a piece of source code that is to be written out again
    chat   first turns of real conversations (ShareGPT), where little of the prompt comes back

Figures are of the steps that only decode, for prompts cost the same either way: tokens per second
of the process's own time, which does not count what other processes take from it, and per second
of the clock. A small model repeats itself more than a large one does: what ``chat`` gains here is
partly that. The tokens of both runs are compared.
"""

import argparse
import inspect
import json
import platform
import subprocess
import textwrap
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoTokenizer

from bench.paper.sharegpt import find_dataset, read_exchanges
from pageframe.core.clock import SystemClock
from pageframe.core.plan import StepPlan
from pageframe.core.request import Delivery, Submission
from pageframe.core.sampling import SamplingParams
from pageframe.core.trace import NullTraceSink
from pageframe.executor.batch import ModelRunner
from pageframe.executor.engine import StepEngine
from pageframe.executor.model.loader import load_runner
from pageframe.scheduler.core import Scheduler
from pageframe.scheduler.options import SchedulerOptions

_MODEL = "smollm2-135m-instruct"
_BLOCK_SIZE = 16
_NUM_BLOCKS = 1024
_MAX_MODEL_LEN = 2048
_NUM_PROMPT_TOKENS_MAX = 400
_SEED = 1
_WORKLOADS = ("copy", "code", "chat")


@dataclass(slots=True)
class Run:
    """What one way of serving one workload came to."""

    num_tokens: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    process_s: float = 0.0
    wall_s: float = 0.0
    texts: dict[int, list[int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One line of the table. Rates are tokens per second of the process's own time."""

    workload: str
    num_at_once: int
    plain_rate: float
    draft_rate: float
    gain: float
    gain_wall: float
    acceptance: float
    tokens_per_step: float
    num_different: int


def main() -> None:
    """Measure, print a table, write JSON where asked for."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    folder = arguments.folder or _prepare(_MODEL)
    workloads = make_workloads(AutoTokenizer.from_pretrained(folder), arguments.requests)
    runner = load_runner(
        str(folder), device="cpu", dtype="float32", max_num_sequences=64, max_step_tokens=512
    )
    comparisons = []
    with Progress(console=Console(stderr=True)) as progress:
        cases = [(name, at_once) for name in arguments.workloads for at_once in arguments.at_once]
        task = progress.add_task("serving", total=len(cases))
        bench = Bench(runner, arguments.tokens, arguments.drafts)
        for name, num_at_once in cases:
            comparisons.append(bench.compare(name, workloads[name], num_at_once))
            progress.advance(task)
    _print_table(comparisons)
    if arguments.json:
        report = {
            "model": arguments.folder.name if arguments.folder else _MODEL,
            "num_requests": arguments.requests,
            "num_tokens_max": arguments.tokens,
            "num_draft_tokens": arguments.drafts,
            "num_threads": arguments.threads,
            "machine": platform.machine(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
            "results": [asdict(entry) for entry in comparisons],
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


class Bench:
    """Serves workloads over one model, whose pool is made once."""

    def __init__(self, runner: ModelRunner, num_tokens: int, num_draft_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._num_draft_tokens = num_draft_tokens
        self._engine = StepEngine(
            runner,
            num_blocks=_NUM_BLOCKS,
            block_size=_BLOCK_SIZE,
            max_num_sequences=64,
            max_step_tokens=512,
            max_model_len=_MAX_MODEL_LEN,
            trace=NullTraceSink(),
            clock=SystemClock(),
            has_prefix_cache=False,
        )
        runner.warm_up()

    def compare(self, name: str, prompts: Sequence[Sequence[int]], num_at_once: int) -> Comparison:
        """Serve ``prompts`` without and with drafts, so many at once."""
        plain = self._serve(prompts, num_at_once, 0)
        drafted = self._serve(prompts, num_at_once, self._num_draft_tokens)
        return Comparison(
            workload=name,
            num_at_once=num_at_once,
            plain_rate=plain.num_tokens / plain.process_s,
            draft_rate=drafted.num_tokens / drafted.process_s,
            gain=drafted.num_tokens / drafted.process_s * plain.process_s / plain.num_tokens,
            gain_wall=drafted.num_tokens / drafted.wall_s * plain.wall_s / plain.num_tokens,
            acceptance=drafted.num_accepted / max(1, drafted.num_drafted),
            tokens_per_step=drafted.num_tokens / max(1, drafted.num_tokens - drafted.num_accepted),
            num_different=sum(plain.texts[index] != drafted.texts[index] for index in plain.texts),
        )

    def _serve(
        self, prompts: Sequence[Sequence[int]], num_at_once: int, num_draft_tokens: int
    ) -> Run:
        engine, clock, run = self._engine, SystemClock(), Run()
        engine.reset()
        options = SchedulerOptions(
            token_budget=512, max_num_running=num_at_once, num_draft_tokens=num_draft_tokens
        )
        scheduler = Scheduler(engine.describe("bench"), options, trace=NullTraceSink(), clock=clock)
        sampling = SamplingParams(temperature=0.0, max_tokens=self._num_tokens)
        for handle, prompt in enumerate(prompts):
            run.texts[handle] = []
            scheduler.submit(_submission(handle, prompt, sampling), gateway_id=1)
        plans: deque[StepPlan] = deque()
        while not scheduler.is_idle:
            process_s, wall_s = time.process_time(), time.perf_counter()
            while (plan := scheduler.plan(clock.now_ns())) is not None:
                plans.append(plan)
            result = engine.step(plans.popleft())
            for _, events in scheduler.on_result(result, clock.now_ns()):
                for completion in events.completions:
                    assert not completion.error_reason, completion
                for handle, token_id in zip(events.handles, events.token_ids, strict=True):
                    run.texts[handle].append(token_id)
            if not result.computed_ids:
                run.num_tokens += len(result.sampled_ids)
                run.num_drafted += sum(result.num_drafted)
                run.num_accepted += sum(result.num_accepted)
                run.process_s += time.process_time() - process_s
                run.wall_s += time.perf_counter() - wall_s
        return run


def make_workloads(tokenizer: Any, num_requests: int) -> dict[str, list[list[int]]]:
    """Prompts of each kind, as token ids; repeatable."""

    def encode(text: str) -> list[int]:
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        token_ids: list[int] = tokenizer.encode(chat, add_special_tokens=False)
        return token_ids

    exchanges = read_exchanges(find_dataset())
    order = np.random.default_rng(_SEED).permutation(len(exchanges)).tolist()
    replies = (exchanges[index].reply for index in order if len(exchanges[index].reply) > 600)
    copies = [
        f"Repeat this text word for word:\n\n{next(replies)[:600]}" for _ in range(num_requests)
    ]
    sources = [
        inspect.getsource(member)
        for module in (textwrap, inspect, argparse, json)
        for _, member in inspect.getmembers(module, inspect.isfunction)
    ]
    sources = [source for source in sources if 300 < len(source) < 1200][:num_requests]
    codes = [f"Write out this Python function again:\n\n```python\n{it}```" for it in sources]
    chats = (encode(exchanges[index].prompt) for index in order)
    short = (chat for chat in chats if len(chat) <= _NUM_PROMPT_TOKENS_MAX)
    return {
        "copy": [encode(text) for text in copies],
        "code": [encode(text) for text in codes],
        "chat": [next(short) for _ in range(num_requests)],
    }


def _submission(handle: int, prompt: Sequence[int], sampling: SamplingParams) -> Submission:
    return Submission(
        handle=handle,
        request_id=f"request-{handle}",
        prompt_token_ids=list(prompt),
        sampling=sampling,
        delivery=Delivery.EVERY_TOKEN,
    )


def _print_table(comparisons: Sequence[Comparison]) -> None:
    table = Table(title="Speculative decoding by n-grams")
    columns: list[tuple[str, Callable[[Comparison], str]]] = [
        ("workload", lambda it: it.workload),
        ("at once", lambda it: str(it.num_at_once)),
        ("tokens/s", lambda it: f"{it.plain_rate:.1f}"),
        ("with drafts", lambda it: f"{it.draft_rate:.1f}"),
        ("gain", lambda it: f"{it.gain:.2f}x"),
        ("by the clock", lambda it: f"{it.gain_wall:.2f}x"),
        ("kept", lambda it: f"{it.acceptance:.0%}"),
        ("tokens a step", lambda it: f"{it.tokens_per_step:.2f}"),
        ("different", lambda it: str(it.num_different)),
    ]
    for name, _ in columns:
        table.add_column(name, justify="left" if name == "workload" else "right")
    for comparison in comparisons:
        table.add_row(*(show(comparison) for _, show in columns))
    Console().print(table)


def _prepare(name: str) -> Path:
    """The folder of a prepared model, preparing it first if need be."""
    command = ["pageframe", "model", "prepare", name]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Path(output.strip().splitlines()[-1])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.speculation", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", nargs="?", type=Path, help=f"model; {_MODEL} if left out")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--drafts", type=int, default=4)
    parser.add_argument("--workloads", nargs="+", choices=_WORKLOADS, default=_WORKLOADS)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
