"""Whole engines over one 8B model of made-up weights: tokens per second, and steps beside a floor.

    round 0      ours: load, load, ...    peer: load, load, ...      warms up, and is not counted
    round 1, 2   ours                     peer                       in turns, medians of rounds

The floor of a decode step is what has to be read for it, all weights but the embedding and the keys
and values of all sequences, at the rate of this device's own copy.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

from bench.gpu import small
from bench.gpu.lab import Lab, Measurement, Sizes
from bench.gpu.loads import LOADS, Engine, EngineError, Figures, Load, check_answers, figures_of
from bench.gpu.made_up import num_weights_of_step
from bench.gpu.our_engine import Capacity, OurEngine
from bench.gpu.transformers_engine import TransformersEngine

MakeEngine = Callable[[], Engine]
MakePeer = Callable[[Sizes, torch.device, torch.dtype, Capacity], Engine]

_NUM_ROUNDS = 2
# In a dry run, a warm-up computes as many in the interpreter.
_NUM_STEP_TOKENS, _NUM_STEP_TOKENS_DRY = 8192, 16
# Enough for engines that prepare for a size when they first meet it.
_WARM_UP_OUT = 16


@dataclass(frozen=True)
class Served:
    """What one engine made of one load.

    Attributes:
        engine: Its name.
        load: Name of the load.
        figures: Median over the rounds; None where there are none.
        rounds: Each round's.
        problem: Why there are no figures; empty where there are.
    """

    engine: str
    load: str
    figures: Figures | None
    rounds: tuple[Figures, ...] = ()
    problem: str = ""


def measure(
    lab: Lab, peer_name: str = TransformersEngine.name, make_peer: MakePeer = TransformersEngine
) -> None:
    """Ours and a peer in turns; ``lab.served`` has all figures, ``lab.found`` the steps.

    Args:
        lab: The copy bandwidth is measured first, unless it is known.
        peer_name: Who it is beside.
        make_peer: Makes that one.
    """
    if "copy" not in lab.found:
        small.copy_bandwidth(lab)
    loads = [load.scaled(lab.sizes) if lab.is_dry else load for load in LOADS]
    place = (lab.sizes, lab.device, lab.dtype)
    makers: dict[str, MakeEngine] = {
        OurEngine.name: lambda: OurEngine(*place, capacity_for(loads, lab.is_dry)),
        peer_name: lambda: make_peer(
            *place, capacity_for([load for load in loads if load.is_for_all], lab.is_dry)
        ),
    }
    served = take_turns(lab, makers, loads, num_rounds=1 if lab.is_dry else _NUM_ROUNDS)
    lab.served += [asdict(each) for each in served]
    for each in served:
        if each.figures is None:
            lab.skipped[f"{each.engine}, {each.load}"] = each.problem
    for load in loads:
        _record_step(lab, load, {each.engine: each for each in served if each.load == load.name})


def capacity_for(loads: Sequence[Load], is_dry: bool) -> Capacity:
    """Room for the largest of ``loads`` without a preemption."""
    max_model_len = max(load.num_in + load.num_out for load in loads)
    return Capacity(
        num_tokens=max(load.num_tokens for load in loads),
        num_sequences=max(load.num_requests for load in loads),
        # To whole blocks of everybody.
        max_model_len=-(-max_model_len // 256) * 256,
        num_step_tokens=_NUM_STEP_TOKENS_DRY if is_dry else _NUM_STEP_TOKENS,
    )


def take_turns(
    lab: Lab, makers: dict[str, MakeEngine], loads: Sequence[Load], *, num_rounds: int
) -> list[Served]:
    """Serve all loads with all engines; the first is ours, and takes loads that others do not.

    An engine that fails is out, with its reason; the others go on.
    """
    turns = _Turns(lab)
    for name, make in makers.items():
        turns.attempt(name, partial(turns.make, name, make))
    ours = next(iter(makers))
    pairs = [(name, load) for name in makers for load in loads if load.is_for_all or name == ours]
    for repetition in range(num_rounds + 1):
        for name, load in pairs:
            turns.attempt(name, partial(turns.serve, name, load, repetition))
    turns.close()
    return [_served(name, load, turns) for name, load in pairs]


class _Turns:
    """Engines that are there, what each was found to do, and why one is out."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._engines: dict[str, Engine] = {}
        self.problems: dict[str, str] = {}
        self.found: defaultdict[tuple[str, str], list[Figures]] = defaultdict(list)

    def attempt(self, name: str, act: Callable[[], None]) -> None:
        """Have ``name`` do something, unless it is out."""
        if name in self.problems:
            return
        # Others' code, of unknown versions: whatever it raises is the answer, not the end.
        try:
            act()
        except Exception as error:
            kind = "" if isinstance(error, EngineError) else f"{type(error).__name__}: "
            self.problems[name] = f"{kind}{error}".strip().partition("\n")[0][:300]

    def make(self, name: str, make: MakeEngine) -> None:
        self._engines[name] = make()

    def serve(self, name: str, load: Load, repetition: int) -> None:
        """One load; the first time a short one, which does not count."""
        given = load
        if repetition == 0:
            given = replace(load, num_out=min(load.num_out, _WARM_UP_OUT))
        requests = given.requests(self._lab.sizes, repetition)
        answers = self._engines[name].serve(requests)
        check_answers(requests, answers)
        if repetition:
            self.found[name, load.name].append(figures_of(answers))

    def close(self) -> None:
        for name, engine in self._engines.items():
            self._lab.engines[name] = engine.facts()
            # One that failed may hold memory all the same; its reason is told already.
            problem = self.problems.pop(name, "")
            self.attempt(name, engine.close)
            if problem:
                self.problems[name] = problem


def _served(name: str, load: Load, turns: _Turns) -> Served:
    rounds, problem = turns.found[name, load.name], turns.problems.get(name, "")
    if not rounds:
        return Served(name, load.name, None, problem=problem or "no round was finished")
    return Served(name, load.name, _medians(rounds), tuple(rounds), problem)


def _medians(rounds: Sequence[Figures]) -> Figures:
    steps = [each.step_s for each in rounds if each.step_s is not None]
    return Figures(
        tokens_per_second=statistics.median(each.tokens_per_second for each in rounds),
        first_token_s=statistics.median(each.first_token_s for each in rounds),
        gap_p50_s=statistics.median(each.gap_p50_s for each in rounds),
        gap_p99_s=statistics.median(each.gap_p99_s for each in rounds),
        step_s=statistics.median(steps) if steps else None,
    )


def step_bytes(lab: Lab, load: Load) -> int:
    """What one decode step of ``load`` reads at least."""
    sizes, itemsize = lab.sizes, int(lab.dtype.itemsize)
    kv_bytes = 2 * sizes.num_layers * sizes.num_kv_heads * sizes.head_dim * itemsize
    num_context_tokens = load.num_requests * load.mean_context
    return round(num_weights_of_step(sizes) * itemsize + num_context_tokens * kv_bytes)


def _record_step(lab: Lab, load: Load, served: dict[str, Served]) -> None:
    ours = served[OurEngine.name]
    if ours.figures is None or ours.figures.step_s is None:
        lab.skipped[f"step, {load.name}"] = ours.problem or "requests never decoded all at once"
        return
    measurement = Measurement(
        f"step, {load.name}",
        ours.figures.step_s,
        min(each.step_s for each in ours.rounds if each.step_s is not None),
        num_bytes=step_bytes(lab, load),
    )
    for name, each in served.items():
        if name != OurEngine.name:
            step_s = each.figures.step_s if each.figures else None
            measurement.peers[name] = step_s if step_s is not None else f"not run: {each.problem}"
    lab.found[measurement.name] = measurement


def table(lab: Lab) -> list[str]:
    """What engines made of the loads, as Markdown."""
    if not lab.served:
        return []
    lines = [
        "",
        "| load | engine | tokens/s | first token, ms | between tokens p50 / p99, ms | step, ms |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for each in lab.served:
        figures = each["figures"]
        if figures is None:
            lines.append(
                f"| {each['load']} | {each['engine']} | not run: {each['problem']} | | | |"
            )
            continue
        step_s = figures["step_s"]
        lines.append(
            f"| {each['load']} | {each['engine']} | {figures['tokens_per_second']:.0f} "
            f"| {figures['first_token_s'] * 1e3:.1f} "
            f"| {figures['gap_p50_s'] * 1e3:.2f} / {figures['gap_p99_s'] * 1e3:.2f} "
            f"| {'' if step_s is None else f'{step_s * 1e3:.2f}'} |"
        )
    lines += [
        f"{name}: " + ", ".join(f"{key} {value}" for key, value in facts.items())
        for name, facts in lab.engines.items()
    ]
    return lines
