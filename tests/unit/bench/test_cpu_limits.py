"""Memory that several threads read at once is read once, and in whole cache lines by each."""

import itertools
import json
import sys

import numpy as np
import pytest
import torch

from bench import cpu_attention, cpu_goals
from bench.cpu_limits import BATCH_BYTES, Limits, starts_of_parts
from pageframe.kernels.cpu.library import load

_FLOATS_PER_BATCH = BATCH_BYTES // 4
_LINE_BYTES = 64


@pytest.fixture(scope="module")
def limits():
    return Limits(load(None))


@pytest.fixture
def torch_threads():
    """Threads of torch are as before afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("num_items", [0, 1, 11, 40_000])
@pytest.mark.parametrize("num_parts", [1, 2, 3, 13])
def test_parts_are_even_and_follow_each_other(num_items, num_parts):
    starts = starts_of_parts(num_items, num_parts)
    assert (starts[0], starts[-1], len(starts)) == (0, num_items, num_parts + 1)
    sizes = np.diff(starts)
    assert sizes.min() >= 0
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("num_threads", [1, 2, 3, 13])
def test_every_byte_is_read_by_one_thread(limits, monkeypatch, num_threads):
    monkeypatch.setattr(limits, "num_threads", num_threads)
    # Every float of batch n is 2 to the n: a sum tells which batches are in it, and is exact.
    powers = 2.0 ** np.arange(11)
    memory = powers.astype(np.float32).repeat(_FLOATS_PER_BATCH)
    read = limits.read(memory.ctypes.data, memory.nbytes)
    starts = starts_of_parts(len(powers), num_threads)
    assert read.totals == tuple(
        powers[start:end].sum() * _FLOATS_PER_BATCH for start, end in itertools.pairwise(starts)
    )


def test_no_two_threads_read_of_a_cache_line(limits):
    assert BATCH_BYTES % _LINE_BYTES == 0
    assert limits._memory.address % _LINE_BYTES == 0
    with pytest.raises(AssertionError, match="832 bytes"):
        limits.read(limits._memory.address, BATCH_BYTES + _LINE_BYTES)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_attention_is_judged_by_what_as_many_threads_read(
    torch_threads, tmp_path, monkeypatch, num_threads
):
    monkeypatch.setattr(cpu_attention, "_GROWTH_CONTEXTS", (16,))
    path = tmp_path / "figures.json"
    words = f"- --threads {num_threads} --dtype bf16 --shapes 2x16 --seconds 0.1 --output {path}"
    monkeypatch.setattr(sys, "argv", words.split())
    assert cpu_attention.main() == 0
    figures = json.loads(path.read_text(encoding="utf-8"))
    assert figures["num_threads"] == figures["read_num_threads"] == num_threads
    assert figures["shapes"][0]["gb_per_s"].keys() == {"built", "reading"}
    (finding,) = cpu_goals.of_attention(figures)
    assert finding.found == figures["shapes"][0]["part_of_plain_read"]["built"] > 0


def test_no_thread_of_torch_takes_a_core_from_attention(torch_threads, monkeypatch):
    """It scaled 64 queries by two threads, one of which went on spinning beside the kernels."""
    seen = []

    def measure(*_: object) -> cpu_attention.Measured:
        seen.append(torch.get_num_threads())
        return cpu_attention.Measured({}, {}, 1.0)

    monkeypatch.setattr(cpu_attention, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["-", "--dtype", "bf16", "--shapes", "2x16"])
    torch.set_num_threads(2)
    assert cpu_attention.main() == 0
    assert seen == [1]
