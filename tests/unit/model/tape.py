"""A recorder that keeps what a CUDA graph keeps: launches, addresses and sizes, and no Python.

While a function runs, every operation of PyTorch and every launch of a kernel is written down with
its arguments. A replay does them again over the same memory, and asks the function nothing. So what
the function took from the host is frozen, as it would be on a GPU; and a look at a number, which
would make a capture fail, fails here.
"""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

_LOOKS = ("_local_scalar_dense", "nonzero", "item", "_to_copy.host")


class _Writing(TorchDispatchMode):
    """Writes operations on a tape."""

    def __init__(self, tape):
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.name().removeprefix("aten::")
        if name.startswith(_LOOKS):
            raise RuntimeError(f"{name} looks at numbers while a graph is recorded")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        storages = {leaf.untyped_storage().data_ptr() for leaf in given}
        results = func(*args, **kwargs)
        fresh = [
            (place, leaf)
            for place, leaf in enumerate(tree_leaves(results))
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in storages
        ]
        # A view needs no doing again; what writes into its arguments needs nothing but that.
        if fresh or func._schema.is_mutable:
            self._tape.append(lambda: self._again(func, args, kwargs, fresh))
        return results

    @staticmethod
    def _again(func, args, kwargs, fresh):
        results = tree_leaves(func(*args, **kwargs))
        for place, leaf in fresh:
            # Freshly allocated memory holds nothing that counts.
            if not func.name().startswith("aten::empty"):
                leaf.copy_(results[place])


class TapeRecorder:
    """A ``graph_recorder.Recorder`` over Triton's interpreter."""

    def __init__(self):
        self.num_recorded = 0
        self.num_replays = 0

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """See ``Recorder.record``."""
        tape = []
        mode = _Writing(tape)
        launch = InterpretedFunction.run

        def run(kernel, *args, **kwargs):
            tape.append(lambda: launch(kernel, *args, **kwargs))
            with torch.utils._python_dispatch._disable_current_modes():
                return launch(kernel, *args, **kwargs)

        InterpretedFunction.run = run
        try:
            with mode:
                function()
        finally:
            InterpretedFunction.run = launch
        self.num_recorded += 1

        def replay():
            self.num_replays += 1
            for step in tape:
                step()

        return replay
