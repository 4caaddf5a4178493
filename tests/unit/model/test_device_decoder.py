"""A model in few kernels gives what it gives in single operations, step after step."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from exactness import tiny_models
from pageframe.executor.batch import StepBatch
from pageframe.executor.model.arena import KvArena
from pageframe.executor.model.decoder_config import parse_decoder_config
from pageframe.executor.model.device_decoder import DeviceDecoder, fits_kernels
from pageframe.executor.model.native import NativeDecoder
from pageframe.executor.model.paged_kv import PagedKv
from pageframe.kernels.layouts import QUANTISED_DTYPES, KvLayout

_CPU = torch.device("cpu")
_BLOCK_SIZE, _NUM_BLOCKS = 4, 12
# Two sequences with blocks that lie anywhere: a long one, and one that comes in later.
_TABLES = np.array([[7, 2, 9, 0, 4], [1, 11, 3, 5, 6]], np.int32)
# New tokens of each sequence in each step.
_STEPS = [(9, 0), (3, 6), (1, 1)]


def _decoders(name, folder):
    tiny_models.build(name, folder)
    config = parse_decoder_config(json.loads((folder / "config.json").read_text()))
    assert fits_kernels(config, torch.float32, torch.float32, (9, 0))
    return config, [
        kind(folder, config, torch.float32, _CPU, lambda *_: None)
        for kind in (NativeDecoder, DeviceDecoder)
    ]


def _batches(vocab_size):
    """Steps over both sequences, with the tokens that they have by then."""
    tokens = np.random.default_rng(3).integers(0, vocab_size, (2, 20))
    ends = np.zeros(2, np.int64)
    for step, counts in enumerate(_STEPS, 1):
        taking = [index for index in (0, 1) if counts[index]]
        spans = [np.arange(ends[index], ends[index] + counts[index]) for index in taking]
        for index in taking:
            ends[index] += counts[index]
        slots = [
            _TABLES[index, span // _BLOCK_SIZE].astype(np.int64) * _BLOCK_SIZE + span % _BLOCK_SIZE
            for index, span in zip(taking, spans, strict=True)
        ]
        num_new = [counts[index] for index in taking]
        none = np.empty(0, np.int32)
        yield StepBatch(
            step=step,
            num_decodes=num_new.count(1),
            rows=np.array(taking, np.int32),
            token_ids=np.concatenate(
                [tokens[index, span] for index, span in zip(taking, spans, strict=True)]
            ).astype(np.int32),
            positions=np.concatenate(spans).astype(np.int32),
            slots=np.concatenate(slots),
            query_start=np.cumsum([0, *num_new]).astype(np.int32),
            context_lens=ends[taking].astype(np.int32),
            block_tables=_TABLES[taking],
            samples=none,
            sample_rows=none,
        )


@pytest.mark.parametrize("name", ["llama31", "qwen3", "mistral"])
def test_hidden_states_and_caches_are_those_of_single_operations(name, tmp_path):
    config, decoders = _decoders(name, tmp_path)
    _assert_alike(config, decoders, torch.float32, error=2**-16)


@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_quantised_cache_serves_alike(kv_dtype, tmp_path):
    config, decoders = _decoders("llama31", tmp_path)
    # A key on a border between two stored numbers may go to either.
    _assert_alike(config, decoders, kv_dtype, error=2**-6)


def _assert_within(fused, plain, error):
    """Differ by ``error`` of the largest number at most."""
    assert (fused - plain).abs().max() <= error * plain.abs().max()


def _assert_alike(config, decoders, kv_dtype, error):
    layout = KvLayout(
        num_layers=config.num_layers,
        block_size=_BLOCK_SIZE,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=kv_dtype,
        is_quantised=kv_dtype in QUANTISED_DTYPES,
    )
    caches = [PagedKv(KvArena(layout, _NUM_BLOCKS, _CPU)) for _ in decoders]
    for batch in _batches(config.vocab_size):
        found = []
        for decoder, kv in zip(decoders, caches, strict=True):
            kv.begin_step(batch)
            states = decoder.forward(
                kv,
                torch.from_numpy(batch.token_ids).long(),
                torch.from_numpy(batch.positions).long(),
                torch.from_numpy(batch.query_start[1:].astype(np.int64) - 1),
            )
            found.append(decoder.logits(states).clone())
        plain, fused = found
        _assert_within(fused, plain, error)
    for index in range(config.num_layers):
        plain, fused = (kv.cells(index).layer.float() for kv in caches)
        if kv_dtype not in QUANTISED_DTYPES:
            _assert_within(fused, plain, error)
        assert (plain != 0).any()


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "capability", "fits"),
    [
        (torch.bfloat16, torch.bfloat16, (8, 0), True),
        (torch.bfloat16, torch.bfloat16, (7, 5), False),
        (torch.float16, torch.int8, (7, 5), True),
        (torch.bfloat16, torch.float8_e4m3fn, (8, 9), True),
        (torch.bfloat16, torch.float8_e4m3fn, (8, 6), False),
    ],
)
def test_kernels_are_for_chips_that_have_the_types(dtype, kv_dtype, capability, fits, tmp_path):
    tiny_models.build("llama", tmp_path)
    config = parse_decoder_config(json.loads((tmp_path / "config.json").read_text()))
    assert fits_kernels(config, dtype, kv_dtype, capability) == fits
    too_wide = dataclasses.replace(config, hidden_size=16385)
    assert not fits_kernels(too_wide, dtype, kv_dtype, capability)
