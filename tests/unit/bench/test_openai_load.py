"""When a run of the load generator counts as good."""

import pytest

from bench.openai_load import verdict

GOOD = {"request_count": {"unit": "requests", "avg": 60.0}, "error_summary": []}


def test_all_requests_ended_without_an_error():
    assert verdict(GOOD, 60) == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"error_summary": [{"error_details": {"code": 500}, "count": 2}]}, "500"),
        ({"request_count": {"avg": 59.0}}, "59 of 60 requests ended"),
        ({"request_count": None}, "0 of 60 requests ended"),
        ({"was_cancelled": True}, "60 of 60"),
    ],
)
def test_anything_else_is_a_failure(change, message):
    assert message in verdict(GOOD | change, 60)
