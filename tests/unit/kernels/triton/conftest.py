"""Each test of a kernel twice: interpreted on the CPU, and on a GPU under ``make test-gpu``."""

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where a test puts its tensors."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("NO CUDA DEVICE HERE: kernels were not tested on one")
    return torch.device(request.param)
