"""What the kernel is asked to read before anybody needs it."""

import os
from pathlib import Path

import pytest

from pageframe.executor import reading_ahead
from pageframe.executor.reading_ahead import read_ahead


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of bytes that were asked for, file by file."""
    asked: list[int] = []
    real = os.posix_fadvise

    def advise(descriptor: int, offset: int, num_bytes: int, advice: int) -> None:
        assert (offset, advice) == (0, os.POSIX_FADV_WILLNEED)
        real(descriptor, offset, num_bytes, advice)
        asked.append(num_bytes)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    return asked


def _write(folder: Path, **num_bytes: int) -> None:
    for name, size in num_bytes.items():
        (folder / f"{name}.safetensors").write_bytes(bytes(size))


def test_all_weights_in_the_order_of_their_names_and_nothing_else(tmp_path, asked):
    _write(tmp_path, b=20, a=10)
    (tmp_path / "tokenizer.json").write_bytes(bytes(5))
    read_ahead(tmp_path)
    assert asked == [10, 20]


def test_no_more_than_the_bound(tmp_path, asked, monkeypatch):
    monkeypatch.setattr(reading_ahead, "_NUM_BYTES_MAX", 25)
    _write(tmp_path, a=10, b=20, c=30)
    read_ahead(tmp_path)
    assert asked == [10, 15]


def test_what_is_not_there_is_left_to_whoever_loads(tmp_path, asked):
    read_ahead(tmp_path / "nowhere")
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "gone")
    _write(tmp_path, b=7)
    read_ahead(tmp_path)
    assert asked == [7]
