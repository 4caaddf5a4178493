"""Paged attention: decode at several sizes, types and block sizes, and prefill of long prompts."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.gpu import peers
from bench.gpu.lab import Lab, Pool, make_pool, make_tables
from bench.gpu.timing import Launch
from pageframe.kernels.ops.triton_attention import TritonAttention

_MANY, _LONG = 64, 4096
_NUM_BYTES_COLD = 512 << 20


def decode(lab: Lab) -> None:
    """The sizes of the goals, 16 tokens per block, in the type of the activations."""
    for num_sequences, length in ((_MANY, _LONG), (8, _LONG), (1, 8 * _LONG), (1, _LONG)):
        name = f"decode {num_sequences} x {length}"
        _decode(lab, name, [lab.sizes.scaled(length)] * lab.sizes.batch(num_sequences))


def decode_skewed(lab: Lab) -> None:
    """One long sequence among 63 short ones, and as many bytes in sequences of one length."""
    lengths = [lab.sizes.scaled(8 * _LONG)] + [lab.sizes.scaled(512)] * (lab.sizes.batch(_MANY) - 1)
    _decode(lab, "decode skewed", lengths)
    _decode(lab, "decode even", [-(-sum(lengths) // len(lengths))] * len(lengths))


def decode_block_sizes(lab: Lab) -> None:
    """Other block sizes, the same tokens."""
    lengths = [lab.sizes.scaled(_LONG)] * lab.sizes.batch(_MANY)
    for block_size in (8, 32, 64, 128):
        _decode(lab, f"decode blocks of {block_size}", lengths, block_size=block_size)


def decode_quantised(lab: Lab) -> None:
    """One byte per number."""
    lengths = [lab.sizes.scaled(_LONG)] * lab.sizes.batch(_MANY)
    for name, dtype in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
        _decode(lab, f"decode {name}", lengths, dtype=dtype)


def prefill(lab: Lab) -> None:
    """One prompt from its beginning, causal."""
    for length in (_LONG, 4 * _LONG):
        scaled = lab.sizes.scaled(length)
        heads = lab.sizes.num_heads
        # Two products of head_dim per pair of query and key, and half of all pairs.
        num_flops = 4 * heads * lab.sizes.head_dim * (scaled * (scaled + 1) // 2)
        _attend(lab, f"prefill {length}", [scaled], is_prefill=True, num_flops=num_flops)


def _decode(
    lab: Lab,
    name: str,
    lengths: Sequence[int],
    *,
    block_size: int = 16,
    dtype: torch.dtype | None = None,
) -> None:
    _attend(lab, name, lengths, block_size=block_size, dtype=dtype, is_prefill=False, num_flops=0)


def _attend(
    lab: Lab,
    name: str,
    lengths: Sequence[int],
    *,
    is_prefill: bool,
    num_flops: int,
    block_size: int = 16,
    dtype: torch.dtype | None = None,
) -> None:
    sizes = lab.sizes
    tables = make_tables(lengths, block_size)
    num_blocks = sum(-(-length // block_size) for length in lengths)
    pool = make_pool(lab, num_blocks, block_size, dtype or lab.dtype)
    counts = list(lengths) if is_prefill else [1] * len(lengths)
    query = torch.randn(
        sum(counts), sizes.num_heads, sizes.head_dim, dtype=lab.dtype, device=lab.device
    )
    attention = TritonAttention(pool.layout, sizes.num_heads, lab.dtype, lab.device)
    query_start = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    plan = attention.plan(
        query_start=query_start,
        context_lens=np.array(lengths, dtype=np.int32),
        block_tables=tables,
        window=None,
    )
    scale = sizes.head_dim**-0.5

    def ours(index: int) -> Launch:
        layer, scales = pool.layer(index), pool.scales(index)
        return lambda: attention.run(plan, query, layer, scale, kv_scales=scales)

    kv_bytes = sum(lengths) * pool.layout.kv_bytes_per_token // sizes.num_layers
    num_bytes = kv_bytes + 2 * query.nbytes
    # A long prefill is bound by computing, and so long that two layers suffice.
    num_launches = 2 if is_prefill else min(sizes.num_layers, max(2, _NUM_BYTES_COLD // kv_bytes))
    work = peers.Work(
        query=query,
        query_start=query_start,
        lengths=np.array(lengths, dtype=np.int32),
        tables=tables,
        layers=[pool.layer(index) for index in range(num_launches)],
        scale=scale,
        is_prefill=is_prefill,
    )
    lab.record(
        name,
        [ours(index) for index in range(num_launches)],
        num_bytes=num_bytes,
        num_flops=num_flops,
        peers=_peers(work, pool),
    )


def _peers(work: peers.Work, pool: Pool) -> dict[str, Callable[[], Sequence[Launch]]]:
    """Those that know this type of cache; the dense one only where it can hold all lengths."""
    if pool.layout.is_quantised:
        return {}
    made: dict[str, Callable[[], Sequence[Launch]]] = {
        "FlashAttention 3": lambda: peers.flash_attention_3(work),
        "FlashInfer": lambda: peers.flashinfer(work),
        "vLLM Triton": lambda: peers.vllm_triton(work),
    }
    if len(set(work.lengths.tolist())) == 1:
        made["SDPA, dense"] = lambda: _dense(work)
    return made


def _dense(work: peers.Work) -> list[Launch]:
    """PyTorch's own attention over contiguous keys and values: no block table to follow."""
    num_sequences, length = len(work.lengths), int(work.lengths[0])
    _, num_heads, head_dim = work.query.shape
    query = work.query.view(num_sequences, -1, num_heads, head_dim).transpose(1, 2).contiguous()
    num_kv_heads = work.layers[0].shape[3]
    shape = (num_sequences, num_kv_heads, length, head_dim)
    pairs = [
        torch.randn(2, *shape, dtype=query.dtype, device=query.device).unbind() for _ in work.layers
    ]
    return [
        partial(
            scaled_dot_product_attention,
            query,
            keys,
            values,
            is_causal=work.is_prefill,
            scale=work.scale,
            enable_gqa=True,
        )
        for keys, values in pairs
    ]
