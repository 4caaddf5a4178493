"""Open many streams at once through one gateway, keep them open, and watch.

    python -m bench.streams --streams 1000 --minutes 10
    python -m bench.streams --streams 1000 --minutes 10 --runner native --output-tokens 64

Prints what came of it as JSON; exits with 1 if a stream failed, or if memory grew over some
minutes. Whether gateway and scheduler are cheap beside the executor is a fair question only where
that computes: the simulated runner waits instead, so with it their part says nothing.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TimeRemainingColumn

from bench.chaos.system import System
from bench.streams.load import Load, Tally
from bench.streams.usage import (
    MIB,
    Sample,
    after_filling,
    cores,
    cpu_share,
    growth_mib,
    is_flat,
    take_sample,
)

SERVICES = ("gateway", "scheduler", "executor", "telemetry")
_SAMPLE_INTERVAL_S = 2.0
_BLOCK_SIZE = 16
_VOCAB_SIZE = 30_000
# Tokens of prompts are short; a block more each than what they fill to the last token.
_NUM_PROMPT_TOKENS_MAX = 16

_Series = dict[str, list[Sample]]


def main() -> int:
    """Run it."""
    arguments = _arguments()
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="pageframe-streams-") as folder:
        options = _options(arguments)
        with System(Path(folder), arguments.model, arguments.runner, options) as system:
            load = Load(
                system.address,
                num_streams=arguments.streams,
                num_output_tokens=arguments.output_tokens,
                vocab_size=_VOCAB_SIZE,
                seed=arguments.seed,
            )
            # A simulated pool has books and no memory.
            is_real = arguments.runner != "sim"
            pool_mib = asyncio.run(system.pool_bytes()) / MIB if is_real else 0.0
            series = asyncio.run(_measure(system, load, arguments.minutes * 60.0, console))
    document = _document(arguments, load.tally, series, pool_mib)
    text = json.dumps(document, indent=2)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    return 0 if document["is_good"] else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=1000, help="streams that are open at once")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--runner", choices=["sim", "native"], default="sim")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--sim-step", default="50ms", help="time of a step of the sim runner")
    parser.add_argument("--output-tokens", type=int, default=400, help="longest output")
    parser.add_argument("--trace", default="all", help="as of `pageframe up`")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="write what is printed here as well")
    return parser.parse_args()


def _options(arguments: argparse.Namespace) -> tuple[str, ...]:
    num_tokens = arguments.output_tokens + _NUM_PROMPT_TOKENS_MAX
    num_blocks = arguments.streams * -(-num_tokens // _BLOCK_SIZE)
    options = {
        "--num-blocks": num_blocks,
        "--block-size": _BLOCK_SIZE,
        "--max-num-sequences": arguments.streams,
        # A decode of each, and room for prompts beside them.
        "--token-budget": arguments.streams + 512,
        "--trace": arguments.trace,
    }
    if arguments.runner == "sim":
        options["--sim-step"] = arguments.sim_step
    return tuple(str(word) for option in options.items() for word in option)


async def _measure(system: System, load: Load, seconds: float, console: Console) -> _Series:
    processes = {name: system.service(name) for name in SERVICES}
    series: _Series = {name: [] for name in SERVICES}
    begin_s = time.monotonic()
    running = asyncio.create_task(load.run(seconds))
    columns = (*Progress.get_default_columns(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("streams", total=seconds)
        while (at_s := time.monotonic() - begin_s) < seconds and not running.done():
            for name, process in processes.items():
                series[name].append(take_sample(process, at_s))
            tally = load.tally
            progress.update(
                task,
                completed=at_s,
                description=f"{tally.num_open} open, {tally.errors.total()} failed",
            )
            await asyncio.wait([running], timeout=_SAMPLE_INTERVAL_S)
    console.print("waiting for the open streams to end", style="dim")
    await running
    for name, process in processes.items():
        assert process.pid == system.service(name).pid, f"{name} was started again"
    return series


def _document(
    arguments: argparse.Namespace,
    tally: Tally,
    series: Mapping[str, Sequence[Sample]],
    pool_mib: float,
) -> dict[str, object]:
    gaps = sorted(tally.gaps_s) or [0.0]
    elapsed_s = series["gateway"][-1].at_s
    watched = {**series, "executor": after_filling(series["executor"], pool_mib)}
    has_grown = any(is_flat(watched[name]) is False for name in SERVICES)
    return {
        "settings": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(arguments).items()
            if name != "output"
        },
        "machine": {"num_cores": os.cpu_count()},
        "pool_mib": pool_mib,
        "num_started": tally.num_started,
        "num_ended": tally.num_ended,
        "num_cut_at_the_end": tally.num_cut,
        "num_errors": tally.errors.total(),
        "errors": dict(tally.errors.most_common(10)),
        "num_messages_per_second": tally.num_messages / elapsed_s,
        "num_tokens_per_second": tally.num_tokens / elapsed_s,
        "num_tokens_per_message": tally.num_tokens / max(1, tally.num_messages),
        "gap_between_messages_ms": {
            "p50": 1000 * statistics.median(gaps),
            "p99": 1000 * gaps[int(0.99 * (len(gaps) - 1))],
        },
        "services": {
            name: {
                "cores": cores(series[name]),
                "pss_mib_first": series[name][0].pss_mib,
                "pss_mib_last": series[name][-1].pss_mib,
                "pss_mib_growth": growth_mib(watched[name]) if watched[name] else None,
                "is_flat": is_flat(watched[name]),
            }
            for name in SERVICES
        },
        "cpu_of_gateway_and_scheduler_by_executor": cpu_share(
            series, ("gateway", "scheduler"), "executor"
        ),
        "series": {
            name: [[round(it.at_s, 1), round(it.pss_mib, 1), round(it.cpu_s, 2)] for it in entries]
            for name, entries in series.items()
        },
        "is_good": not tally.errors and tally.num_ended > 0 and not has_grown,
    }


if __name__ == "__main__":
    sys.exit(main())
