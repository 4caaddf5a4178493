import numpy as np
import pytest

from pageframe.core.sampling import SamplingParams
from pageframe.core.step import FinishReason
from pageframe.executor.finish import FinishRules


def reason(
    sampling: SamplingParams, *, num_output: int, token_id: int, max_model_len: int = 100
) -> FinishReason:
    """Why a sequence with ten prompt tokens ends when its latest output token is ``token_id``."""
    rules = FinishRules(2, max_model_len=max_model_len, eos_token_ids=(2, 3))
    rules.admit(1, sampling, 10)
    rows, num_tokens, token_ids = (
        np.array([number], dtype=np.int32) for number in (1, 10 + num_output, token_id)
    )
    return FinishReason(int(rules.reasons(rows, num_tokens, token_ids)[0]))


@pytest.mark.parametrize(
    ("sampling", "num_output", "token_id", "expected"),
    [
        (SamplingParams(), 5, 50, FinishReason.NONE),
        (SamplingParams(), 5, 3, FinishReason.STOP),
        (SamplingParams(ignore_eos=True), 5, 3, FinishReason.NONE),
        (SamplingParams(min_tokens=6), 5, 3, FinishReason.NONE),
        (SamplingParams(min_tokens=6), 6, 3, FinishReason.STOP),
        (SamplingParams(stop_token_ids=(50, 51)), 5, 51, FinishReason.STOP),
        (SamplingParams(stop_token_ids=(50,), ignore_eos=True), 5, 50, FinishReason.STOP),
        (SamplingParams(stop_token_ids=(50,), min_tokens=9), 5, 50, FinishReason.NONE),
        (SamplingParams(stop_token_ids=tuple(range(40, 60))), 5, 59, FinishReason.STOP),
        (SamplingParams(max_tokens=5), 4, 50, FinishReason.NONE),
        (SamplingParams(max_tokens=5), 5, 50, FinishReason.LENGTH),
        (SamplingParams(max_tokens=5), 5, 3, FinishReason.STOP),
        (SamplingParams(max_tokens=2**31 - 1), 90, 50, FinishReason.LENGTH),
        (SamplingParams(max_tokens=2**31 - 1), 89, 50, FinishReason.NONE),
    ],
)
def test_a_sequence_ends_for_the_first_reason_that_holds(sampling, num_output, token_id, expected):
    assert reason(sampling, num_output=num_output, token_id=token_id) is expected


def test_a_reused_row_forgets_the_stop_tokens_of_its_last_sequence():
    rules = FinishRules(1, max_model_len=100, eos_token_ids=())
    rules.admit(0, SamplingParams(stop_token_ids=tuple(range(10))), 1)
    rules.admit(0, SamplingParams(stop_token_ids=(50,)), 1)
    rows, num_tokens = np.zeros(1, dtype=np.int32), np.full(1, 5, dtype=np.int32)
    reasons = rules.reasons(rows, num_tokens, np.array([9], dtype=np.int32))
    assert reasons.tolist() == [FinishReason.NONE]
