"""Reference of ``ops.quantise``: one row at a time, the nearest stored number by search."""

import torch

_TYPES_MAX = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantise(rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise finite rows; arguments and results as in ``ops.quantise``."""
    numbers = _stored_numbers(dtype)
    exact = rows.float().reshape(-1, rows.shape[-1])
    scales = torch.empty(exact.shape[0])
    places = torch.empty(exact.shape, dtype=torch.int64)
    for index, row in enumerate(exact):
        # float32 by definition: scales are part of what is stored.
        scale = max(row.abs().max() / _TYPES_MAX[dtype], torch.tensor(2.0**-126))
        scales[index] = scale
        for channel, number in enumerate(row / scale):
            places[index, channel] = _nearest(numbers, float(number))
    # Converting a number that the type can hold changes nothing.
    stored = numbers.to(dtype)[places]
    return stored.reshape(rows.shape), scales.reshape(rows.shape[:-1])


def _stored_numbers(dtype: torch.dtype) -> torch.Tensor:
    """Every finite number of the type in rising order, -0 left out, as float64."""
    if dtype == torch.int8:
        return torch.arange(-127, 128, dtype=torch.float64)
    # e4m3 by its definition: 1 sign, 4 exponent bits of bias 7, 3 fraction bits, no infinity.
    positive = [fraction * 2.0**-9 for fraction in range(1, 8)]
    positive += [
        (8 + fraction) * 2.0 ** (exponent - 10)
        for exponent in range(1, 16)
        for fraction in range(8)
        if (exponent, fraction) != (15, 7)
    ]
    numbers = [-number for number in reversed(positive)] + [0.0, *positive]
    return torch.tensor(numbers, dtype=torch.float64)


def _nearest(numbers: torch.Tensor, wanted: float) -> int:
    """Place of the nearest number; of two equally near, the one with an even last digit."""
    distances = (numbers - wanted).abs()
    nearest: list[int] = torch.nonzero(distances == distances.min()).flatten().tolist()
    # Zero stands in the middle and is even, and numbers alternate from there.
    middle = numbers.shape[0] // 2
    return min(nearest, key=lambda place: (place - middle) % 2)
