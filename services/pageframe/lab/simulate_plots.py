"""Plots of simulated runs, as PNG files; needs matplotlib, which only this module imports."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pageframe.core.errors import UnimplementedError
from pageframe.core.units import NANOSECONDS_PER_SECOND
from pageframe.lab.simulate import Outcome

_NUM_POINTS_MAX = 2000


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw how long everybody waited, and what memory and queue were like over time.

    Raises:
        UnimplementedError: MATPLOTLIB_MISSING.
    """
    try:
        import matplotlib
    except ImportError:
        raise UnimplementedError(
            "MATPLOTLIB_MISSING", "plots need matplotlib: install it, or leave out --plot"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(12, 7), layout="constrained")
    (first, between), (blocks, living) = panels
    for outcome in outcomes:
        run, name = outcome.run, outcome.policy.name
        ids, times = run.token_times()
        starts = np.flatnonzero(np.diff(ids, prepend=-1))
        places = [run.request_of[sequence_id] for sequence_id in ids[starts].tolist()]
        arrival_s = np.array([run.arrivals[place].arrival_s for place in places])
        seconds = times / NANOSECONDS_PER_SECOND
        first.plot(*_tail(seconds[starts] - arrival_s), label=name)
        between.plot(*_tail(np.delete(np.diff(seconds, prepend=0), starts) * 1000), label=name)
        at_s = np.frombuffer(run.steps.end_ns, dtype=np.int64) / NANOSECONDS_PER_SECOND
        every = slice(None, None, max(1, len(at_s) // _NUM_POINTS_MAX))
        held = np.frombuffer(run.steps.num_held, dtype=np.int64)
        blocks.plot(at_s[every], 100 * held[every] / run.num_blocks, label=name, linewidth=1)
        num_living = np.frombuffer(run.steps.num_living, dtype=np.int64)
        living.plot(at_s[every], num_living[every], label=name, linewidth=1)
    for axes, label in (
        (first, "time to first token [s]"),
        (between, "time between tokens [ms]"),
    ):
        axes.set_xlabel(label)
        axes.set_ylabel("share that waits longer")
        axes.set_yscale("log")
        axes.set_xscale("log")
    for axes, label in ((blocks, "blocks held [%]"), (living, "requests running or waiting")):
        axes.set_xlabel("time [s]")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    first.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _tail(values: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]") -> tuple[object, object]:
    """Values in rising order, and the share of all that is larger or equal."""
    ordered = np.sort(values)
    shares = 1 - np.arange(len(ordered)) / max(1, len(ordered))
    # Of many points the last ones matter, so pick evenly on the logarithm of the share.
    places = len(ordered) - np.geomspace(max(1, len(ordered)), 1, _NUM_POINTS_MAX)
    chosen = np.unique(np.clip(places.astype(int), 0, max(0, len(ordered) - 1)))
    return (ordered[chosen], shares[chosen]) if len(ordered) else (ordered, shares)
