"""How far a result that is rounded once may be from the exact one."""

import torch

# Half a unit in the last place, and some float32 rounding on the way there: a device's exponential
# and square root are good to 2^-21. Triton's interpreter cuts bfloat16 off where a device rounds to
# nearest: a whole unit.
RELATIVE = {torch.float32: 4e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
FLOATS = tuple(RELATIVE)


def assert_rounds_to(actual, exact, smallest=1e-6):
    """``actual`` is ``exact``, float64, rounded to its own type; or within ``smallest`` of it."""
    torch.testing.assert_close(
        actual.double().cpu(), exact.cpu(), rtol=RELATIVE[actual.dtype], atol=smallest
    )
