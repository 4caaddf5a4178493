"""What steps cost on a machine that is not here, and how much KV memory it has.

    step = base + decodes * a + context * b + prefill tokens * c + pairs * d + moved blocks * e

The parts are added, not overlapped, so a step is rather too long than too short. ``H200_8B`` is an
8-billion-parameter Llama in bf16 (32 layers, 8 heads of keys and values of 128, 128 KiB a token)
on an NVIDIA H200 of 141 GB. Its floor follows from what is read: at the 4.3 TB/s that a copy
reaches there, 15.0 GB of weights take 3.5 ms and 32 x 4,096 tokens of context 4.0 ms. Its decode
steps are 1.25 times that floor, which is what this project asks of its own steps with CUDA graphs.
Prefill computes 14 Gflop a token (the layers; logits are needed for one token of a prompt) at
600 Tflop/s, and 0.52 Mflop a pair (4 * 4,096 * 32) at 350 Tflop/s of attention.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

from pageframe.core.errors import InvalidRequestError
from pageframe.executor.batch import StepBatch
from pageframe.executor.block_moves import BlockMoves

_GRAPHS_OVER_FLOOR = 1.25
_COPY_BYTES_PER_NS = 4300.0
_KV_BYTES_PER_TOKEN_8B = 2 * 32 * 8 * 128 * 2
_HOST_BYTES_PER_NS = 45.0
_UNITS_NS = {"ns": 1.0, "us": 1e3, "ms": 1e6, "s": 1e9}
_TERM = re.compile(r"\s*([a-z-]+)\s*=\s*(\d+(?:\.\d+)?)\s*(ns|us|ms|s)\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCost:
    """One model on one device; times in nanoseconds.

    Attributes:
        name: For people.
        base_ns: Every step.
        decode_ns: Each sequence that decodes.
        context_ns: Each position that a decode attends to.
        prefill_ns: Each token of a sequence that is catching up.
        pair_ns: Each such token with each position that it attends to.
        move_ns: Each block moved to the host tier or from there.
        kv_bytes_per_token: Keys and values of one token over all layers.
        kv_memory_bytes: Memory for keys and values.
    """

    name: str
    base_ns: float = 0.0
    decode_ns: float = 0.0
    context_ns: float = 0.0
    prefill_ns: float = 0.0
    pair_ns: float = 0.0
    move_ns: float = 0.0
    kv_bytes_per_token: int = _KV_BYTES_PER_TOKEN_8B
    kv_memory_bytes: int = 110_000_000_000

    def of(self, batch: StepBatch) -> int:
        """Nanoseconds that ``batch`` lasts."""
        num_decodes = batch.num_decodes
        cost_ns = self.base_ns + self.decode_ns * num_decodes
        cost_ns += self.context_ns * int(batch.context_lens[:num_decodes].sum())
        num_prefill_tokens = len(batch.token_ids) - num_decodes
        if num_prefill_tokens:
            # Decodes have one token each and come first.
            num_pairs = int(batch.positions[num_decodes:].sum()) + num_prefill_tokens
            cost_ns += self.prefill_ns * num_prefill_tokens + self.pair_ns * num_pairs
        return round(cost_ns)

    def of_moves(self, moves: BlockMoves) -> int:
        """Nanoseconds that ``moves`` last, before the batch; copies on the device are free."""
        return round(self.move_ns * (len(moves.out_slots) + len(moves.in_targets)))

    def num_blocks(self, block_size: int) -> int:
        """Blocks that KV memory holds."""
        return self.kv_memory_bytes // (self.kv_bytes_per_token * block_size)


H200_8B = DeviceCost(
    name="8B on an H200",
    base_ns=_GRAPHS_OVER_FLOOR * 15.0e9 / _COPY_BYTES_PER_NS,
    context_ns=_GRAPHS_OVER_FLOOR * _KV_BYTES_PER_TOKEN_8B / _COPY_BYTES_PER_NS,
    prefill_ns=14e9 / 600e3,
    pair_ns=4 * 4096 * 32 / 350e3,
    move_ns=16 * _KV_BYTES_PER_TOKEN_8B / _HOST_BYTES_PER_NS,
)
"""See the module text. Of its 141 GB, 16 are weights and 15 are left for everything else."""

_PRESETS = {"h200-8b": H200_8B}
_FIELDS = {
    "base": "base_ns",
    "decode": "decode_ns",
    "context": "context_ns",
    "prefill": "prefill_ns",
    "pair": "pair_ns",
    "move": "move_ns",
}


def parse_cost(text: str) -> DeviceCost:
    """``h200-8b``, or terms such as ``base=2ms,decode=10us,context=40ns,prefill=25us,pair=2ns``.

    Terms that are left out cost nothing.

    Raises:
        InvalidRequestError: COST_MALFORMED, with what is allowed.
    """
    if text in _PRESETS:
        return _PRESETS[text]
    cost = DeviceCost(name=text)
    for term in text.split(","):
        match = _TERM.fullmatch(term)
        if match is None or match[1] not in _FIELDS:
            raise InvalidRequestError(
                "COST_MALFORMED",
                f"{term!r} is no cost; write {', '.join(_PRESETS)} or terms NAME=TIME such as "
                f"base=2ms,prefill=25us with the names {', '.join(_FIELDS)}",
            )
        changed: dict[str, Any] = {_FIELDS[match[1]]: float(match[2]) * _UNITS_NS[match[3]]}
        cost = replace(cost, **changed)
    return cost
