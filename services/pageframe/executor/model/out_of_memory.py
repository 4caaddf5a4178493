"""What a device's lack of memory is called."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pageframe.core.errors import ResourceExhaustedError


@contextmanager
def told_of_memory(device: torch.device, what: str, max_step_tokens: int) -> Iterator[None]:
    """Say in our own words that the memory of ``device`` ran out in ``what``.

    Raises:
        ResourceExhaustedError: DEVICE_OUT_OF_MEMORY.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceExhaustedError(
            "DEVICE_OUT_OF_MEMORY",
            f"the memory of {device} ran out in {what}: {error}; fewer blocks, a smaller "
            "token budget or fewer sequences leave more",
            device=str(device),
            max_step_tokens=max_step_tokens,
        ) from error
