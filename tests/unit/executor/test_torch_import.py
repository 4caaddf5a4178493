"""PyTorch without what only its compiler needs, each time in a process of its own."""

import subprocess
import sys

_BEGIN = """
import sys
from pageframe.executor.torch_import import complete_torch, import_torch
import_torch()
import torch
held = vars(sys.modules["torch._meta_registrations"])
"""


def run(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _BEGIN + code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_what_only_the_compiler_needs_is_not_loaded_and_steps_compute():
    run("""
assert "activate_meta" not in held
torch.manual_seed(0)
x = torch.randn(3, 4)
assert torch.equal(torch.nn.functional.linear(x, torch.eye(4)), x)
assert torch.allclose(torch.softmax(x, -1).sum(-1), torch.ones(3))
assert torch.empty(2, 3, device="meta").sum(0).shape == (3,)
assert "activate_meta" not in held
""")


def test_shapes_without_values_are_there_when_they_are_asked_for():
    run("""
def shape():
    empty = torch.empty(3, 3, device="meta")
    return torch.ops.aten._weight_norm_interface(empty, empty)[0].shape

try:
    shape()
except NotImplementedError:
    complete_torch()
assert "activate_meta" in held
assert shape() == (3, 3)
""")


def test_whoever_imports_something_from_it_gets_it():
    run("""
from torch._meta_registrations import register_meta
assert register_meta is held["register_meta"]
complete_torch()
""")
