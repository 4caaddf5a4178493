"""Other implementations of paged attention, where they can be imported: same blocks, same tables.

Each function returns launches over the same layers as ours, or raises: ``Lab.record`` writes down
why there is no figure. Nothing is downloaded.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from bench.gpu.timing import Launch


@dataclass(frozen=True)
class Work:
    """One step of paged attention.

    Attributes:
        query: shape (T, num_heads, head_dim).
        query_start: int32 [S + 1].
        lengths: int32 [S], tokens of each sequence.
        tables: int32 [S, W].
        layers: Each of shape (num_blocks, 2, block_size, num_kv_heads, head_dim).
        scale: Multiplies scores.
        is_prefill: Whether all tokens are new; else one of each sequence is.
    """

    query: torch.Tensor
    query_start: np.ndarray
    lengths: np.ndarray
    tables: np.ndarray
    layers: list[torch.Tensor]
    scale: float
    is_prefill: bool

    def on_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.query.device)

    def of_each_layer(self, launch: Callable[[torch.Tensor], object]) -> list[Launch]:
        return [partial(launch, layer) for layer in self.layers]

    @property
    def block_size(self) -> int:
        return int(self.layers[0].shape[2])


def flash_attention_3(work: Work) -> list[Launch]:
    """The library with a block table: its own package's, or else what vLLM has of it."""
    if importlib.util.find_spec("flash_attn_interface") is None:
        return _flash_attention_3_of_vllm(work)
    attend = importlib.import_module("flash_attn_interface").flash_attn_with_kvcache
    query = work.query.view(len(work.lengths), -1, *work.query.shape[1:])
    lengths, tables = work.on_device(work.lengths), work.on_device(work.tables)

    def launch(layer: torch.Tensor) -> object:
        return attend(
            query,
            layer[:, 0],
            layer[:, 1],
            cache_seqlens=lengths,
            page_table=tables,
            softmax_scale=work.scale,
            causal=True,
        )

    return work.of_each_layer(launch)


def _flash_attention_3_of_vllm(work: Work) -> list[Launch]:
    module = importlib.import_module("vllm.vllm_flash_attn.flash_attn_interface")
    if not module.FA3_AVAILABLE:
        raise ImportError(module.FA3_UNAVAILABLE_REASON)
    query_start = work.on_device(work.query_start)
    lengths, tables = work.on_device(work.lengths), work.on_device(work.tables)

    def launch(layer: torch.Tensor) -> object:
        return module.flash_attn_varlen_func(
            q=work.query,
            k=layer[:, 0],
            v=layer[:, 1],
            max_seqlen_q=int(np.diff(work.query_start).max()),
            cu_seqlens_q=query_start,
            max_seqlen_k=int(work.lengths.max()),
            seqused_k=lengths,
            softmax_scale=work.scale,
            causal=True,
            block_table=tables,
            fa_version=3,
        )

    return work.of_each_layer(launch)


def flashinfer(work: Work) -> list[Launch]:
    """The wrappers for decode with tensor cores, and for prefill."""
    library = importlib.import_module("flashinfer")
    counts = -(-work.lengths // work.block_size)
    starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    ids = np.concatenate([row[:count] for row, count in zip(work.tables, counts, strict=True)])
    last = (work.lengths - 1) % work.block_size + 1
    pages = [work.on_device(array.astype(np.int32)) for array in (starts, ids, last)]
    memory = torch.empty(256 << 20, dtype=torch.uint8, device=work.query.device)
    num_heads, head_dim = work.query.shape[1:]
    num_kv_heads = work.layers[0].shape[3]
    sizes = (num_heads, num_kv_heads, head_dim, work.block_size)
    if work.is_prefill:
        wrapper = library.BatchPrefillWithPagedKVCacheWrapper(memory, "NHD")
        starts_of_queries = work.on_device(work.query_start)
        wrapper.plan(starts_of_queries, *pages, *sizes, causal=True, q_data_type=work.query.dtype)
    else:
        wrapper = library.BatchDecodeWithPagedKVCacheWrapper(memory, "NHD", use_tensor_cores=True)
        wrapper.plan(*pages, *sizes, q_data_type=work.query.dtype)
    return work.of_each_layer(lambda layer: wrapper.run(work.query, (layer[:, 0], layer[:, 1])))


def vllm_triton(work: Work) -> list[Launch]:
    """vLLM's unified attention kernel."""
    module = importlib.import_module("vllm.v1.attention.ops.triton_unified_attention")
    out = torch.empty_like(work.query)
    query_start = work.on_device(work.query_start)
    lengths, tables = work.on_device(work.lengths), work.on_device(work.tables)

    def launch(layer: torch.Tensor) -> object:
        return module.unified_attention(
            q=work.query,
            k=layer[:, 0],
            v=layer[:, 1],
            out=out,
            cu_seqlens_q=query_start,
            max_seqlen_q=int(np.diff(work.query_start).max()),
            seqused_k=lengths,
            max_seqlen_k=int(work.lengths.max()),
            softmax_scale=work.scale,
            causal=True,
            window_size=(-1, -1),
            block_table=tables,
            softcap=0,
            q_descale=None,
            k_descale=None,
            v_descale=None,
        )

    return work.of_each_layer(launch)
