"""The small kernels: rotary and cache write, norm, SwiGLU, moves of blocks, choice of tokens."""

from collections.abc import Sequence

import torch
from torch.nn.functional import rms_norm, silu

from bench.gpu.lab import Lab, make_pool
from bench.gpu.timing import Launch
from pageframe.kernels.ops.choose_token import choose_token
from pageframe.kernels.ops.move_rows import move_rows
from pageframe.kernels.ops.residual_norm import residual_norm
from pageframe.kernels.ops.rotary_write import rotary_write
from pageframe.kernels.ops.swiglu import swiglu

_MANY_TOKENS, _FEW_TOKENS = 8192, 64
_BLOCK_SIZE = 16
# More than any second-level cache holds.
_NUM_BYTES_COLD = 256 << 20
_NUM_LAUNCHES_MAX = 256
_LARGE_BLOCK_BYTES, _SMALL_BLOCK_BYTES = 2 << 20, 32 << 10


def copy_bandwidth(lab: Lab) -> None:
    """What this device can do at best: PyTorch's copy of 2 GiB."""
    source = torch.zeros(lab.sizes.scaled(2 << 30, 4096) // 4, device=lab.device)
    target = torch.empty_like(source)
    lab.record("copy", [lambda: target.copy_(source)], num_bytes=2 * source.nbytes)


def rotary(lab: Lab) -> None:
    """All heads of a layer, for a long prefill and for a batch that decodes."""
    for num_tokens in (_MANY_TOKENS, _FEW_TOKENS):
        _rotary(lab, num_tokens)


def _rotary(lab: Lab, num_tokens: int) -> None:
    sizes, count = lab.sizes, lab.sizes.scaled(num_tokens)
    pool = make_pool(lab, -(-count // _BLOCK_SIZE) + 1, _BLOCK_SIZE, lab.dtype)
    slots = torch.randperm(count, device=lab.device)
    angles = torch.rand(count, sizes.head_dim // 2, device=lab.device).to(lab.dtype)
    all_heads = _cold(lab, (count, sizes.num_heads + 2 * sizes.num_kv_heads, sizes.head_dim))
    queries = torch.empty_like(all_heads[0][:, : sizes.num_heads]).contiguous()

    def launch(heads: torch.Tensor, layer: torch.Tensor) -> Launch:
        return lambda: rotary_write(heads, angles, angles, queries, layer, slots)

    lab.record(
        f"rotary and write, {num_tokens} tokens",
        [launch(heads, pool.layer(index)) for index, heads in enumerate(all_heads)],
        num_bytes=2 * all_heads[0].nbytes + 2 * angles.nbytes,
    )


def norm(lab: Lab) -> None:
    """Residual and RMSNorm."""
    for num_tokens in (_MANY_TOKENS, _FEW_TOKENS):
        _norm(lab, num_tokens)


def _norm(lab: Lab, num_tokens: int) -> None:
    many_hidden = _cold(lab, (lab.sizes.scaled(num_tokens), lab.sizes.hidden_size))
    delta, out = torch.randn_like(many_hidden[0]), torch.empty_like(many_hidden[0])
    weight = torch.ones(lab.sizes.hidden_size, dtype=lab.dtype, device=lab.device)

    def fused(hidden: torch.Tensor) -> Launch:
        return lambda: residual_norm(hidden, delta, weight, 1e-5, out)

    def separate(hidden: torch.Tensor) -> Launch:
        return lambda: rms_norm(hidden.add_(delta), weight.shape, weight, 1e-5)

    lab.record(
        f"residual and norm, {num_tokens} tokens",
        [fused(hidden) for hidden in many_hidden],
        num_bytes=4 * delta.nbytes,
        peers={"PyTorch": lambda: [separate(hidden) for hidden in many_hidden]},
    )


def activation(lab: Lab) -> None:
    """SwiGLU."""
    for num_tokens in (_MANY_TOKENS, _FEW_TOKENS):
        _activation(lab, num_tokens)


def _activation(lab: Lab, num_tokens: int) -> None:
    count, size = lab.sizes.scaled(num_tokens), lab.sizes.intermediate_size
    many = _cold(lab, (count, 2 * size))
    out = torch.empty(count, size, dtype=lab.dtype, device=lab.device)

    def fused(rows: torch.Tensor) -> Launch:
        return lambda: swiglu(rows, out)

    def separate(rows: torch.Tensor) -> Launch:
        return lambda: torch.mul(silu(rows[:, :size]), rows[:, size:], out=out)

    lab.record(
        f"SwiGLU, {num_tokens} tokens",
        [fused(rows) for rows in many],
        num_bytes=3 * out.nbytes,
        peers={"PyTorch": lambda: [separate(rows) for rows in many]},
    )


def block_copies(lab: Lab) -> None:
    """64 copies of blocks of 2 MiB inside a pool."""
    count = lab.sizes.batch(64)
    row_bytes = lab.sizes.scaled(_LARGE_BLOCK_BYTES, 4096)
    arena = torch.zeros(4 * count, row_bytes, dtype=torch.uint8, device=lab.device)
    order = torch.randperm(4 * count, device=lab.device)
    sources, targets = order[:count].contiguous(), order[count : 2 * count].contiguous()
    lab.record(
        "block copy",
        [lambda: move_rows(arena, sources, arena, targets)],
        num_bytes=2 * count * row_bytes,
        peers={
            "PyTorch": lambda: [
                lambda: arena.index_copy_(0, targets, arena.index_select(0, sources))
            ]
        },
    )


def swaps(lab: Lab) -> None:
    """Blocks to pinned memory: gathered and sent in one piece, beside other ways."""
    for name, block_bytes, count in (
        ("2 MiB", _LARGE_BLOCK_BYTES, 64),
        ("32 KiB", _SMALL_BLOCK_BYTES, 2048),
    ):
        _swap(lab, name, lab.sizes.scaled(block_bytes, 4096), lab.sizes.batch(count))


def _swap(lab: Lab, name: str, row_bytes: int, count: int) -> None:
    arena = torch.zeros(2 * count, row_bytes, dtype=torch.uint8, device=lab.device)
    ids = torch.randperm(2 * count, device=lab.device)[:count]
    places = torch.arange(count, device=lab.device)
    staging = torch.empty(count, row_bytes, dtype=torch.uint8, device=lab.device)
    host = torch.empty(count, row_bytes, dtype=torch.uint8, pin_memory=not lab.is_dry)
    rows = ids.tolist()

    def gather_and_send() -> None:
        move_rows(arena, ids, staging, places)
        host.copy_(staging, non_blocking=True)

    def send_row_by_row() -> None:
        for place, row in enumerate(rows):
            host[place].copy_(arena[row], non_blocking=True)

    lab.record(
        f"swap out, blocks of {name}",
        [gather_and_send],
        num_bytes=count * row_bytes,
        peers={
            "pinned copy": lambda: [lambda: host.copy_(staging, non_blocking=True)],
            "row by row": lambda: [send_row_by_row],
            "kernel to host": lambda: [lambda: move_rows(arena, ids, host, places)],
        },
        is_eager=True,
    )


def tokens(lab: Lab) -> None:
    """64 rows of logits: greedy, drawn, and drawn from a nucleus."""
    vocab_size = lab.sizes.vocab_size
    _tokens(lab, "greedy", temperature=0.0, top_k=vocab_size, top_p=1.0)
    _tokens(lab, "drawn", temperature=1.0, top_k=vocab_size, top_p=1.0)
    _tokens(lab, "top-k and top-p", temperature=0.8, top_k=50, top_p=0.9)


def _tokens(lab: Lab, name: str, *, temperature: float, top_k: int, top_p: float) -> None:
    count = lab.sizes.batch(64)
    logits = torch.randn(count, lab.sizes.vocab_size, device=lab.device) * 4

    def column(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((count,), value, dtype=dtype, device=lab.device)

    columns = {
        "temperatures": column(temperature, torch.float32),
        "top_ks": column(top_k, torch.int32),
        "top_ps": column(top_p, torch.float64),
        "min_ps": column(0.0, torch.float32),
        "seeds": torch.arange(count, device=lab.device),
        "sample_indices": column(0, torch.int64),
        "positions": column(7, torch.int64),
    }
    chosen = column(0, torch.int32)
    lab.record(
        f"tokens, {name}",
        [lambda: choose_token(logits, chosen, **columns)],
        num_bytes=logits.nbytes,
    )


def _cold(lab: Lab, shape: Sequence[int]) -> list[torch.Tensor]:
    """Enough inputs of one shape that no launch finds its own in the cache."""
    first = torch.randn(*shape, dtype=lab.dtype, device=lab.device)
    wanted = -(-_NUM_BYTES_COLD // max(first.nbytes, 1))
    count = 1 if lab.is_dry else min(max(wanted, 2), _NUM_LAUNCHES_MAX)
    return [first, *(torch.randn_like(first) for _ in range(count - 1))]
