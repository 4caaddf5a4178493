"""What the kernels have to reach, and whether they did: one line for each goal.

Absolute goals are for one H200. Where they come from: the best figures published for FlashAttention
3, FlashInfer and vLLM on this memory, and arithmetic from its copy bandwidth.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bench.gpu.lab import Lab, Measurement
from bench.gpu.overlap import STEPS, SWAPS

_MICRO = 1e6


@dataclass(frozen=True)
class Goal:
    """A figure with two borders.

    Attributes:
        name: What is measured, with its unit.
        value: Reads the figure from what was found; KeyError where something was not measured.
        must: Has to be reached.
        stretch: Would be better.
        is_low_better: Whether to stay below.
    """

    name: str
    value: Callable[[Lab], float]
    must: float
    stretch: float
    is_low_better: bool = True

    def judge(self, lab: Lab) -> tuple[float | None, str]:
        """The figure, and the verdict in a word; no figure where something is missing."""
        try:
            value = self.value(lab)
        except KeyError as error:
            return None, f"not measured: {error.args[0]}"
        if lab.is_dry:
            return value, "dry run"
        for border, word in ((self.stretch, "stretch"), (self.must, "pass")):
            if value <= border if self.is_low_better else value >= border:
                return value, word
        return value, "FAIL"


def _micros(name: str) -> Callable[[Lab], float]:
    return lambda lab: lab.found[name].seconds * _MICRO


def _millis(name: str) -> Callable[[Lab], float]:
    return lambda lab: lab.found[name].seconds * 1e3


def _ratio(name: str, other: str) -> Callable[[Lab], float]:
    return lambda lab: lab.found[name].seconds / lab.found[other].seconds


def _seconds_per_byte(measurement: Measurement) -> float:
    return measurement.seconds / measurement.num_bytes


def _share_of_copy(name: str) -> Callable[[Lab], float]:
    return lambda lab: lab.found[name].bytes_per_second / lab.found["copy"].bytes_per_second


def _peer_seconds(measurement: Measurement, peers: Iterable[str]) -> float:
    """The fastest of those that ran.

    Raises:
        KeyError: none did.
    """
    found = [measurement.peers.get(peer) for peer in peers]
    numbers = [seconds for seconds in found if isinstance(seconds, float)]
    if not numbers:
        raise KeyError(f"no peer ran beside {measurement.name}")
    return min(numbers)


def _times_peer(name: str, *peers: str) -> Callable[[Lab], float]:
    """How many times as fast as the fastest of them."""
    return lambda lab: _peer_seconds(lab.found[name], peers) / lab.found[name].seconds


def _spread_of_blocks(lab: Lab) -> float:
    names = ["decode 64 x 4096", *(f"decode blocks of {size}" for size in (8, 32, 64, 128))]
    times = [lab.found[name].seconds for name in names]
    return max(times) / min(times)


def _tera_flops(name: str) -> Callable[[Lab], float]:
    return lambda lab: lab.found[name].flops_per_second / 1e12


def _times_floor(name: str) -> Callable[[Lab], float]:
    """How many times as long as reading the same bytes at the rate of this device's copy."""
    return lambda lab: lab.found["copy"].bytes_per_second / lab.found[name].bytes_per_second


def _times_longer_of_both(lab: Lab) -> float:
    """How many times as long as the longer of the two alone; 1 where one hides the other."""
    both = lab.found["swaps beside steps"]
    alone = [_peer_seconds(both, [name]) for name in (STEPS, SWAPS)]
    return both.seconds / max(alone)


_BEST_DECODERS = ("FlashAttention 3", "FlashInfer")
GOALS = (
    Goal("decode 64 x 4096, us", _micros("decode 64 x 4096"), 290, 268),
    Goal(
        "decode 64 x 4096, times the better of FlashAttention 3 and FlashInfer",
        _times_peer("decode 64 x 4096", *_BEST_DECODERS), 0.95, 1.0, is_low_better=False,
    ),
    Goal("decode 8 x 4096, us", _micros("decode 8 x 4096"), 45, 40),
    Goal("decode 1 x 32768, us", _micros("decode 1 x 32768"), 48, 43),
    Goal("decode 1 x 4096, us", _micros("decode 1 x 4096"), 18, 14),
    Goal(
        "decode of skewed lengths, time per byte of even ones",
        lambda lab: _seconds_per_byte(lab.found["decode skewed"])
        / _seconds_per_byte(lab.found["decode even"]),
        1.25, 1.1,
    ),
    Goal("decode fp8, time of bf16", _ratio("decode fp8", "decode 64 x 4096"), 0.62, 0.55),
    Goal("decode int8, time of bf16", _ratio("decode int8", "decode 64 x 4096"), 0.62, 0.55),
    Goal("blocks of 8 to 128 tokens, slowest by fastest", _spread_of_blocks, 1.1, 1.05),
    Goal("prefill 4096, TFLOP/s", _tera_flops("prefill 4096"), 350, 450, is_low_better=False),
    Goal("prefill 16384, TFLOP/s", _tera_flops("prefill 16384"), 400, 500, is_low_better=False),
    Goal(
        "prefill 16384, times vLLM's Triton kernel",
        _times_peer("prefill 16384", "vLLM Triton"), 2.0, 3.0, is_low_better=False,
    ),
    Goal(
        "rotary and write, 8192 tokens, share of copy",
        _share_of_copy("rotary and write, 8192 tokens"), 0.75, 0.85, is_low_better=False,
    ),
    Goal("rotary and write, 64 tokens, us", _micros("rotary and write, 64 tokens"), 5, 3),
    Goal(
        "block copy, 64 x 2 MiB, share of copy",
        _share_of_copy("block copy"), 0.8, 0.9, is_low_better=False,
    ),
    Goal(
        "swap out, blocks of 2 MiB, share of a pinned copy",
        _times_peer("swap out, blocks of 2 MiB", "pinned copy"), 0.85, 0.95, is_low_better=False,
    ),
    Goal(
        "swap out, blocks of 32 KiB, share of a pinned copy",
        _times_peer("swap out, blocks of 32 KiB", "pinned copy"), 0.85, 0.95, is_low_better=False,
    ),
    Goal("swaps beside steps, times the longer of both", _times_longer_of_both, 1.15, 1.05),
    Goal("8B step, 64 x 4096, ms", _millis("step, 64 x 4096"), 14.4, 12.9),
    Goal("8B step, 64 x 4096, times its floor", _times_floor("step, 64 x 4096"), 1.25, 1.12),
    Goal("8B step, batch 1, ms", _millis("step, 1 x 1024"), 4.4, 3.9),
    Goal("8B step, batch 1, times its floor", _times_floor("step, 1 x 1024"), 1.25, 1.12),
)  # fmt: skip
