"""Incremental counts equal counts from nothing."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pageframe.executor.model.history import TokenHistory


def counts_of(history):
    return dict(zip(history.token_ids.tolist(), history.output_counts.tolist(), strict=True))


@given(
    prompt=st.lists(st.integers(0, 9), min_size=1, max_size=20),
    known=st.lists(st.integers(0, 300), max_size=20),
    new=st.lists(st.integers(0, 300), max_size=300),
)
def test_recording_equals_rebuilding(prompt, known, new):
    history = TokenHistory(np.array(prompt + known, dtype=np.int32), len(prompt))
    for token_id in new:
        history.record(token_id)
    output = Counter(known + new)
    assert counts_of(history) == {token: output[token] for token in prompt + known + new}
    assert history.num_tokens == len(prompt) + len(known) + len(new)


def test_grows_past_its_first_allocation():
    history = TokenHistory(np.array([5], dtype=np.int32), 1)
    for token_id in range(1000):
        history.record(token_id)
    assert counts_of(history) == dict.fromkeys(range(1000), 1.0)
