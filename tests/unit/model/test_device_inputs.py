"""What a step tells a device goes there in one copy, and lies at addresses that stay."""

import numpy as np
import pytest
import torch

from pageframe.executor.model import device_inputs
from pageframe.executor.model.device_inputs import DeviceInputs, TokenReturn

_CPU = torch.device("cpu")
_FIELDS = {"a": (np.int32, 3), "b": (np.int64, 2), "c": (np.float64, 1), "none": (np.int32, 0)}


class _Marker:
    """Writes down when it is set and when it is waited for."""

    def __init__(self, log, name):
        self._log = log
        self._name = name

    def set(self):
        self._log.append(("set", self._name))

    def wait(self):
        self._log.append(("wait", self._name))


@pytest.fixture
def log(monkeypatch):
    """What markers were told, in order."""
    told, made = [], []

    def make_marker(device):
        made.append(device)
        return _Marker(told, len(made) - 1)

    monkeypatch.setattr(device_inputs, "make_marker", make_marker)
    return told


def _fill(inputs, number):
    inputs.begin()
    inputs.host("a")[:] = number
    inputs.host("b")[:] = [-number, 2**40 + number]
    inputs.host("c")[:] = number / 4
    inputs.host_tail(2)[:] = [number, number + 1]


def test_fields_and_tail_arrive_in_their_types_at_addresses_that_stay():
    inputs = DeviceInputs(_FIELDS, 5, _CPU)
    addresses = {name: inputs.device(name).data_ptr() for name in _FIELDS}
    for number in (3, 4, 5):
        _fill(inputs, number)
        inputs.send(2)
        assert inputs.device("a").tolist() == [number] * 3
        assert inputs.device("b").tolist() == [-number, 2**40 + number]
        assert inputs.device("c").tolist() == [number / 4]
        assert inputs.device("none").numel() == 0
        assert inputs.device_tail(2).tolist() == [number, number + 1]
    assert {name: inputs.device(name).data_ptr() for name in _FIELDS} == addresses
    assert all(address % 64 == addresses["a"] % 64 for address in addresses.values())


def test_nothing_arrives_before_it_is_sent_nor_more_of_the_tail_than_that():
    inputs = DeviceInputs(_FIELDS, 5, _CPU)
    _fill(inputs, 1)
    inputs.send(2)
    _fill(inputs, 2)
    assert inputs.device("a").tolist() == [1, 1, 1]
    inputs.send(1)
    assert inputs.device_tail(2).tolist() == [2, 2]
    inputs.send(0)
    assert inputs.device_tail(2).tolist() == [2, 2]


def test_a_buffer_is_written_again_only_when_the_copy_out_of_it_is_done(log):
    inputs = DeviceInputs(_FIELDS, 5, _CPU)
    for number in range(3):
        _fill(inputs, number)
        inputs.send(2)
    # Never the copy of the step before, which may be under way.
    assert log == [
        ("wait", 1), ("set", 1), ("wait", 0), ("set", 0), ("wait", 1), ("set", 1),
    ]  # fmt: skip


def test_tokens_are_waited_for_when_they_are_asked_for_and_two_batches_are_under_way(log):
    returned = TokenReturn(4, _CPU)
    first = returned.fetch(torch.tensor([5, 6, 7], dtype=torch.int32))
    second = returned.fetch(torch.tensor([8], dtype=torch.int32))
    assert log == [("set", 1), ("set", 0)]
    tokens = first.wait()
    assert tokens.tolist() == [5, 6, 7]
    assert second.wait().tolist() == [8]
    assert log[2:] == [("wait", 1), ("wait", 0)]
    returned.fetch(torch.tensor([1, 2, 3], dtype=torch.int32))
    # What was taken is the caller's own.
    assert tokens.tolist() == [5, 6, 7]
    assert tokens.dtype == np.int32
