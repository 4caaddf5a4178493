"""What measurements share: sizes, the device, pools with random blocks, and what was found."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from bench.gpu.timing import Launch, Time, time_eager, time_launches
from pageframe.kernels.layouts import QUANTISED_DTYPES, SCALE_DTYPE, KvLayout


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model, and by how much a dry run makes everything smaller."""

    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    num_layers: int = 32
    hidden_size: int = 4096
    intermediate_size: int = 14336
    vocab_size: int = 128256
    divisor: int = 1

    def scaled(self, count: int, smallest: int = 1) -> int:
        """A count of tokens, rows or bytes; smaller in a dry run."""
        return max(count // self.divisor, smallest)

    def batch(self, count: int) -> int:
        """A number of sequences; at most two in a dry run."""
        return count if self.divisor == 1 else min(count, 2)


LLAMA_3_8B = Sizes()
TINY = Sizes(
    num_heads=4,
    num_kv_heads=1,
    head_dim=32,
    num_layers=2,
    hidden_size=64,
    intermediate_size=96,
    vocab_size=300,
    divisor=128,
)


@dataclass
class Measurement:
    """One kernel at one size.

    Attributes:
        name: Unique.
        seconds: Median per launch.
        best_seconds: Lowest of the replays.
        num_bytes: What has to be moved at least, read and written.
        num_flops: What has to be computed at least.
        peers: Seconds of other implementations on the same work, or why there is no figure.
    """

    name: str
    seconds: float
    best_seconds: float
    num_bytes: int = 0
    num_flops: int = 0
    peers: dict[str, float | str] = field(default_factory=dict)

    @property
    def bytes_per_second(self) -> float:
        return self.num_bytes / self.seconds

    @property
    def flops_per_second(self) -> float:
        return self.num_flops / self.seconds


@dataclass
class Lab:
    """The device, the sizes, and what has been found so far.

    Attributes:
        device: Where everything is measured.
        sizes: Of the model.
        found: Kernels and steps by name.
        skipped: Why parts are missing, by name.
        served: What whole engines made of loads, see ``end_to_end.Served``.
        engines: Their versions and choices.
    """

    device: torch.device
    sizes: Sizes
    found: dict[str, Measurement] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    served: list[dict[str, Any]] = field(default_factory=list)
    engines: dict[str, dict[str, object]] = field(default_factory=dict)

    @property
    def is_dry(self) -> bool:
        return bool(self.device.type == "cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of activations; the interpreter computes wrongly in bfloat16."""
        return torch.float32 if self.is_dry else torch.bfloat16

    def record(
        self,
        name: str,
        launches: Sequence[Launch],
        *,
        num_bytes: int = 0,
        num_flops: int = 0,
        peers: dict[str, Callable[[], Sequence[Launch]]] | None = None,
        is_eager: bool = False,
    ) -> Measurement:
        """Measure launches and the peers' launches; a peer that fails is told with its reason."""
        measure = time_eager if is_eager else time_launches
        taken = measure(launches, self.device)
        measurement = Measurement(name, taken.median, taken.best, num_bytes, num_flops)
        for peer, make in (peers or {}).items():
            measurement.peers[peer] = self._peer_seconds(make, measure)
        self.found[name] = measurement
        return measurement

    def _peer_seconds(
        self,
        make: Callable[[], Sequence[Launch]],
        measure: Callable[[Sequence[Launch], torch.device], Time],
    ) -> float | str:
        # Others' code, of unknown versions: whatever it raises is the answer, not the end.
        try:
            return measure(make(), self.device).median
        except Exception as error:
            return f"not run: {type(error).__name__}: {str(error).strip()[:120]}"

    def as_json(self) -> dict[str, object]:
        """All figures."""
        return {
            "measurements": [asdict(each) for each in self.found.values()],
            "skipped": self.skipped,
            "served": self.served,
            "engines": self.engines,
        }


@dataclass
class Pool:
    """A pool laid out as an arena lays it out, with random content and a random order of blocks."""

    layout: KvLayout
    blocks: torch.Tensor

    def layer(self, index: int) -> torch.Tensor:
        num_bytes = self.layout.num_elements_per_block * self.layout.dtype.itemsize
        payload = self.blocks[:, :num_bytes].view(self.layout.dtype)
        return payload.view(-1, *self.layout.block_shape)[:, index % self.layout.num_layers]

    def scales(self, index: int) -> torch.Tensor | None:
        if not self.layout.is_quantised:
            return None
        start = self.layout.payload_bytes_per_block
        part = self.blocks[:, start : start + self.layout.scale_bytes_per_block]
        scales = part.view(SCALE_DTYPE).view(-1, *self.layout.block_shape[:-1])
        return scales[:, index % self.layout.num_layers]


def make_pool(lab: Lab, num_blocks: int, block_size: int, dtype: torch.dtype) -> Pool:
    """A pool of small random numbers."""
    layout = KvLayout(
        num_layers=lab.sizes.num_layers,
        block_size=block_size,
        num_kv_heads=lab.sizes.num_kv_heads,
        head_dim=lab.sizes.head_dim,
        dtype=dtype,
        is_quantised=dtype in QUANTISED_DTYPES,
    )
    # Bytes below 0x38 are small numbers in every type, and no NaN.
    blocks = torch.randint(
        0, 0x38, (num_blocks, layout.block_bytes), dtype=torch.uint8, device=lab.device
    )
    pool = Pool(layout, blocks)
    for index in range(layout.num_layers if layout.is_quantised else 0):
        scales = pool.scales(index)
        assert scales is not None
        scales.fill_(0.01)
    return pool


def make_tables(context_lens: Sequence[int], block_size: int) -> np.ndarray:
    """Block tables that use each block once, in random order: int32 [S, W]."""
    numbers = np.random.default_rng(0)
    counts = [-(-length // block_size) for length in context_lens]
    order = numbers.permutation(sum(counts)).astype(np.int32)
    tables = np.zeros((len(counts), max(counts)), dtype=np.int32)
    first = 0
    for row, count in enumerate(counts):
        tables[row, :count] = order[first : first + count]
        first += count
    return tables
