"""Who comes when, and wants how much: from a file, from a distribution, or from a journal.

A file of arrivals has one JSON object on each line, in any order:

    {"arrival_s": 0.25, "num_prompt_tokens": 800, "num_output_tokens": 120, "tenant": "alice"}

    arrival_s            seconds since the beginning; must be given
    num_prompt_tokens    or prompt_token_ids, a list: one of them must be given
    num_output_tokens    or max_tokens: how many tokens come out; must be given
    num_samples          outputs of one prompt; 1
    tenant               whose request it is; ""
    priority             higher runs earlier; 0
    deadline_s           seconds after arrival until nobody wants it any more; none
    prefix_id            requests with one prefix id begin with the same tokens; none
    num_prefix_tokens    how many; half of the prompt unless given
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pageframe.core.errors import InvalidRequestError

LENGTHS_PATH = Path(__file__).with_name("data") / "sharegpt_lengths.npz"
"""Tokens in the first prompts and first replies of ShareGPT V3 (numbers only, none of its text):
17,000 conversations counted with the tokeniser of SmolLM2, without those of more than 8,192."""

_MEAN_SIGMA = 0.8
_FIELDS = {
    "arrival_s": float,
    "num_prompt_tokens": int,
    "prompt_token_ids": list,
    "num_output_tokens": int,
    "max_tokens": int,
    "num_samples": int,
    "tenant": str,
    "priority": int,
    "deadline_s": float,
    "prefix_id": str,
    "num_prefix_tokens": int,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One request.

    Attributes:
        arrival_s: Seconds since the beginning.
        num_prompt_tokens: At least 1.
        num_output_tokens: Of each sample, at least 1.
        num_samples: Outputs of one prompt.
        tenant: Whose request it is.
        priority: Higher runs earlier.
        deadline_s: Seconds after its arrival until nobody wants it; 0 for never.
        prefix_id: Requests with the same one begin alike; empty for none.
        num_prefix_tokens: How many tokens those have in common.
        prompt_token_ids: The prompt, where it is known.
    """

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    num_samples: int = 1
    tenant: str = ""
    priority: int = 0
    deadline_s: float = 0.0
    prefix_id: str = ""
    num_prefix_tokens: int = 0
    prompt_token_ids: tuple[int, ...] = ()


def read_arrivals(path: Path) -> list[Arrival]:
    """Arrivals of a file, in order of time.

    Raises:
        InvalidRequestError: ARRIVALS_MALFORMED, with the line and what is wrong in it.
    """
    arrivals = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(
            "ARRIVALS_MALFORMED", f"cannot read arrivals from {path}: {error}"
        ) from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            arrivals.append(_parse(json.loads(line)))
        except ValueError as error:
            raise InvalidRequestError(
                "ARRIVALS_MALFORMED", f"line {number} of {path} is no arrival: {error}", line=number
            ) from None
    return sorted(arrivals, key=lambda arrival: arrival.arrival_s)


def poisson_arrivals(
    num_requests: int,
    rate_per_s: float,
    *,
    mean_prompt_tokens: int,
    mean_output_tokens: int,
    seed: int,
) -> list[Arrival]:
    """Independent arrivals of a rate; lengths are log-normal with these means."""
    rng = np.random.default_rng(seed)
    prompts = _log_normal(mean_prompt_tokens, num_requests, rng)
    outputs = _log_normal(mean_output_tokens, num_requests, rng)
    return _at_rate(prompts, outputs, rate_per_s, rng)


def sharegpt_arrivals(num_requests: int, rate_per_s: float, *, seed: int) -> list[Arrival]:
    """Independent arrivals of a rate; lengths are those of real first turns."""
    rng = np.random.default_rng(seed)
    with np.load(LENGTHS_PATH, allow_pickle=False) as lengths:
        prompts, outputs = lengths["num_prompt_tokens"], lengths["num_output_tokens"]
    chosen = rng.integers(len(prompts), size=num_requests)
    return _at_rate(prompts[chosen], outputs[chosen], rate_per_s, rng)


def share_prefixes(
    arrivals: Iterable[Arrival], num_prefixes: int, num_prefix_tokens: int, *, seed: int
) -> list[Arrival]:
    """Put one of ``num_prefixes`` system prompts of so many tokens before each prompt."""
    rng = np.random.default_rng(seed)
    return [
        replace(
            arrival,
            num_prompt_tokens=arrival.num_prompt_tokens + num_prefix_tokens,
            prefix_id=str(int(rng.integers(num_prefixes))),
            num_prefix_tokens=num_prefix_tokens,
        )
        for arrival in arrivals
    ]


def _at_rate(
    prompts: NDArray[np.integer[Any]],
    outputs: NDArray[np.integer[Any]],
    rate_per_s: float,
    rng: np.random.Generator,
) -> list[Arrival]:
    times = np.cumsum(rng.exponential(1 / rate_per_s, len(prompts)))
    return [
        Arrival(arrival_s=arrival_s, num_prompt_tokens=prompt, num_output_tokens=output)
        for arrival_s, prompt, output in zip(
            times.tolist(), prompts.tolist(), outputs.tolist(), strict=True
        )
    ]


def _log_normal(mean: int, size: int, rng: np.random.Generator) -> NDArray[np.int64]:
    drawn = rng.lognormal(np.log(mean) - _MEAN_SIGMA**2 / 2, _MEAN_SIGMA, size)
    return np.maximum(1, np.rint(drawn)).astype(np.int64)


def _parse(fields: object) -> Arrival:
    """Raises ``ValueError`` with what is wrong."""
    if not isinstance(fields, dict):
        raise ValueError("a JSON object is expected")
    _check_types(fields)
    token_ids = tuple(fields.get("prompt_token_ids", ()))
    num_prompt_tokens = len(token_ids) or fields.get("num_prompt_tokens", 0)
    num_output_tokens = fields.get("num_output_tokens") or fields.get("max_tokens") or 0
    prefix_id = fields.get("prefix_id", "")
    num_prefix_tokens = fields.get("num_prefix_tokens", num_prompt_tokens // 2 if prefix_id else 0)
    arrival = Arrival(
        arrival_s=float(fields.get("arrival_s", -1)),
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=num_output_tokens,
        num_samples=fields.get("num_samples", 1),
        tenant=fields.get("tenant", ""),
        priority=fields.get("priority", 0),
        deadline_s=float(fields.get("deadline_s", 0)),
        prefix_id=prefix_id,
        num_prefix_tokens=num_prefix_tokens,
        prompt_token_ids=token_ids,
    )
    _check_ranges(arrival)
    return arrival


def _check_types(fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        if name not in _FIELDS:
            raise ValueError(f"{name!r} is none of {', '.join(_FIELDS)}")
        allowed = (int, float) if _FIELDS[name] is float else _FIELDS[name]
        if isinstance(value, bool) or not isinstance(value, allowed):
            raise ValueError(f"{name} must be of type {_FIELDS[name].__name__}")
    ids = fields.get("prompt_token_ids", [])
    if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise ValueError("prompt_token_ids must be whole numbers from 0 on")


def _check_ranges(arrival: Arrival) -> None:
    if arrival.arrival_s < 0:
        raise ValueError("arrival_s must be given, and not be negative")
    if arrival.num_prompt_tokens < 1:
        raise ValueError("num_prompt_tokens or prompt_token_ids must be given")
    if arrival.num_output_tokens < 1 or arrival.num_samples < 1:
        raise ValueError("num_output_tokens must be given; it and num_samples must be at least 1")
    if not 0 <= arrival.num_prefix_tokens <= arrival.num_prompt_tokens or arrival.deadline_s < 0:
        raise ValueError("num_prefix_tokens must lie within the prompt, deadline_s not be negative")
