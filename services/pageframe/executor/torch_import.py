"""Imports PyTorch without what only its compiler needs: a third of the time that it takes.

``torch._meta_registrations`` says for a thousand operators which shape their result has, so that
they can be traced without being computed (tensors on the ``meta`` device, ``torch.compile``). To
register them takes half a second, and steps compute.
"""

import os

from pageframe.config.imports import load_postponed, postponed

_META_REGISTRATIONS = "torch._meta_registrations"


def import_torch() -> None:
    """Import PyTorch; afterwards ``import torch`` takes no time."""
    # Looks through all packages for devices of others; ours are those that PyTorch has itself.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    with postponed(_META_REGISTRATIONS):
        import torch  # noqa: F401


def complete_torch() -> None:
    """Bring in what ``import_torch`` left out, for code of others that may trace."""
    load_postponed(_META_REGISTRATIONS)
