"""Whatever a tenant asks for and whenever: never more than a minute's worth and rate times time."""

from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st

from pageframe.core.errors import OutOfRangeError, ResourceExhaustedError
from pageframe.core.request import Submission
from pageframe.core.sampling import SamplingParams
from pageframe.core.terms import TenantRate
from pageframe.core.units import NANOSECONDS_PER_SECOND
from pageframe.scheduler.rate_limits import RateLimits

MINUTE_NS = 60 * NANOSECONDS_PER_SECOND

# Nanoseconds until it comes, prompt, longest output, samples, parts of it used, whether it ends
# before the next comes.
REQUEST = st.tuples(
    st.integers(0, 2 * MINUTE_NS),
    st.integers(1, 30),
    st.integers(1, 30),
    st.integers(1, 3),
    st.floats(0, 1),
    st.booleans(),
)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 100), st.integers(1, 10), st.lists(REQUEST, max_size=40))
def test_no_tenant_gets_more_than_its_rate_and_who_waits_as_told_is_let_in(
    tokens_per_minute: int,
    requests_per_minute: int,
    asked: list[tuple[int, int, int, int, float, bool]],
) -> None:
    rate = TenantRate(
        tenant="a",
        num_requests_per_minute=requests_per_minute,
        num_tokens_per_minute=tokens_per_minute,
    )
    limits = RateLimits([rate], 0)
    now_ns = num_tokens = 0
    begun_ns: list[int] = []
    running: list[SimpleNamespace] = []
    for after_ns, num_prompt, max_tokens, num_samples, part, ends in asked:
        now_ns += after_ns
        submission = Submission(
            handle=1,
            request_id="x",
            prompt_token_ids=[1] * num_prompt,
            sampling=SamplingParams(max_tokens=max_tokens, seed=1),
            num_samples=num_samples,
            tenant="a",
        )
        try:
            limits.check(submission, now_ns)
        except OutOfRangeError:
            assert num_prompt + max_tokens * num_samples > tokens_per_minute
            continue
        except ResourceExhaustedError as error:
            # Told to the millisecond, rounded up.
            now_ns += int(float(error.limits["retry_after_s"]) * 1000 + 0.5) * 1_000_000
            limits.check(submission, now_ns)
        used = int(part * max_tokens)
        request = SimpleNamespace(
            submission=submission,
            is_rated=False,
            sequences=[SimpleNamespace(output=[0] * used)] * num_samples,
        )
        limits.charge(request, now_ns)
        begun_ns.append(now_ns)
        num_tokens += num_prompt + used * num_samples
        running.append(request)
        if ends:
            for over in running:
                limits.settle(over)
            running.clear()
        # From whenever one looks: nothing is saved up.
        for index, since_ns in enumerate(begun_ns):
            num_minutes = (now_ns - since_ns) / MINUTE_NS
            assert len(begun_ns) - index <= requests_per_minute * (1 + num_minutes) + 1e-6
        assert num_tokens <= tokens_per_minute * (1 + now_ns / MINUTE_NS) + 1e-6
