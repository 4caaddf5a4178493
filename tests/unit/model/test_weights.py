"""Reading and borrowing tensors of safetensors files."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pageframe.core.errors import InvalidRequestError
from pageframe.executor.model.weights import WeightReader

STORED = torch.arange(12, dtype=torch.bfloat16).view(3, 4)
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"up": STORED, "down": STORED.T.contiguous()}, tmp_path / "model.safetensors")
    return tmp_path


def test_what_is_borrowed_is_the_file_itself(folder):
    told: list[int] = []
    with WeightReader(folder, torch.bfloat16, CPU, lambda read, _: told.append(read)) as reader:
        borrowed = reader.borrow("up", 3, 4)
        assert borrowed.dtype == torch.bfloat16
        assert torch.equal(borrowed, STORED)
        # The same pages, not a copy of them.
        assert reader.borrow("up", 3, 4).data_ptr() == borrowed.data_ptr()
        assert reader.read("up", 3, 4).data_ptr() != borrowed.data_ptr()
        assert told == [24, 48, 72]
        reader.read("down", 4, 3)


def test_what_has_another_type_is_converted(folder):
    with WeightReader(folder, torch.float32, CPU, lambda *_: None) as reader:
        borrowed = reader.borrow("up", 3, 4)
        assert borrowed.dtype == torch.float32
        assert torch.equal(borrowed, STORED.float())
        reader.borrow("down", 4, 3)


def _borrow_one_of_two(folder: Path) -> None:
    with WeightReader(folder, torch.bfloat16, CPU, lambda *_: None) as reader:
        reader.borrow("up", 3, 4)


def test_what_was_borrowed_counts_as_read(folder):
    with pytest.raises(InvalidRequestError, match="1 tensors of the checkpoint, down among them"):
        _borrow_one_of_two(folder)


@pytest.mark.parametrize("shape", [(4, 3), (3, 5), (2, 4), (12,)], ids=str)
def test_another_shape_is_refused(folder, shape):
    with WeightReader(folder, torch.bfloat16, CPU, lambda *_: None) as reader:
        with pytest.raises(InvalidRequestError) as refused:
            reader.borrow("up", *shape)
        assert refused.value.reason == "MODEL_WEIGHTS_INVALID"
        reader.read("up", 3, 4)
        reader.read("down", 4, 3)


def test_a_missing_tensor_is_refused(folder):
    with WeightReader(folder, torch.bfloat16, CPU, lambda *_: None) as reader:
        with pytest.raises(InvalidRequestError, match="tensor gate is missing"):
            reader.borrow("gate", 3, 4)
        reader.read("up", 3, 4)
        reader.read("down", 4, 3)
