"""How much each tenant may ask for in a minute, counted where all its requests meet.

A rate is a bucket: a minute's worth fits in, it fills at the rate, and who finds too little in it
is refused and told when there will be enough (the leaky bucket of Turner, "New directions in
communications", IEEE Communications Magazine 1986, as a meter).

    level  60 ┤●╮      ╭──────   full: nothing more is saved up
              │ ╰╮   ╭─╯
           0 ─┤  ╰─●─╯           a request takes all that it may use, and gives back what it did not

A request takes tokens for its prompt and for the longest output that it allows, when it comes; when
it is over it gives back what it did not use. So a tenant never gets more than a minute's worth
and the rate times the time, whatever it has running. Levels are whole numbers, in units times
nanoseconds of a minute, so nothing is lost to rounding.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pageframe.core.errors import OutOfRangeError, ResourceExhaustedError
from pageframe.core.request import RateLevel, RateLevels, Submission
from pageframe.core.terms import TenantRate
from pageframe.core.units import NANOSECONDS_PER_SECOND, ceil_div

if TYPE_CHECKING:
    from pageframe.scheduler.request import Request

_MINUTE_NS = 60 * NANOSECONDS_PER_SECOND


class Bucket:
    """Units of one kind for one tenant, full at first.

    Args:
        num_per_minute: The rate, and what fits in; at least 1.
        now_ns: When it begins.
    """

    def __init__(self, num_per_minute: int, now_ns: int) -> None:
        self.num_per_minute = num_per_minute
        self._level = num_per_minute * _MINUTE_NS
        self._filled_ns = now_ns

    def change(self, num_per_minute: int, now_ns: int) -> None:
        """Another rate from now on; what was taken and has not come back stays taken."""
        self._fill(now_ns)
        self._level += (num_per_minute - self.num_per_minute) * _MINUTE_NS
        self.num_per_minute = num_per_minute

    def num_left(self, now_ns: int) -> int:
        """Whole units that are in it."""
        self._fill(now_ns)
        return max(0, self._level // _MINUTE_NS)

    def wait_ns(self, num_units: int, now_ns: int) -> int:
        """Nanoseconds until ``num_units`` are in it; 0 if they are. They have to fit at all."""
        self._fill(now_ns)
        lacking = num_units * _MINUTE_NS - self._level
        return ceil_div(max(0, lacking), self.num_per_minute)

    def level(self, now_ns: int) -> RateLevel:
        """How full it is."""
        full_after_ns = self.wait_ns(self.num_per_minute, now_ns)
        return RateLevel(self.num_per_minute, self.num_left(now_ns), full_after_ns)

    def take(self, num_units: int, now_ns: int) -> None:
        """Take units, whether or not they are there."""
        self._fill(now_ns)
        self._level -= num_units * _MINUTE_NS

    def give_back(self, num_units: int) -> None:
        """Give back units that were taken and not used."""
        full = self.num_per_minute * _MINUTE_NS
        self._level = min(full, self._level + num_units * _MINUTE_NS)

    def _fill(self, now_ns: int) -> None:
        # Wall time may be set back; what was filled in stays in.
        elapsed_ns = max(0, now_ns - self._filled_ns)
        full = self.num_per_minute * _MINUTE_NS
        self._level = min(full, self._level + elapsed_ns * self.num_per_minute)
        self._filled_ns = now_ns


class RateLimits:
    """The rates of all tenants. Costs nothing for who has none.

    Args:
        rates: One for each tenant that has any.
        now_ns: When they begin.
    """

    def __init__(self, rates: Iterable[TenantRate], now_ns: int) -> None:
        self._requests: dict[str, Bucket] = {}
        self._tokens: dict[str, Bucket] = {}
        self.change(rates, now_ns)

    def change(self, rates: Iterable[TenantRate], now_ns: int) -> None:
        """Other rates from now on; who is not named has none."""
        named = list(rates)
        self._requests = _changed(
            self._requests, {it.tenant: it.num_requests_per_minute for it in named}, now_ns
        )
        self._tokens = _changed(
            self._tokens, {it.tenant: it.num_tokens_per_minute for it in named}, now_ns
        )

    def check(self, submission: Submission, now_ns: int) -> None:
        """Refuse a request that comes too early, or that no minute could ever hold.

        A request that a gateway sends again is let in: it was let in before, and the loss of a
        scheduler is no fault of its caller.

        Raises:
            ResourceExhaustedError: RATE_LIMITED, with ``retry_after_s`` and both levels.
            OutOfRangeError: EXCEEDS_RATE.
        """
        tenant = submission.tenant
        requests, tokens = self._requests.get(tenant), self._tokens.get(tenant)
        if submission.is_resubmitted or (requests is None and tokens is None):
            return
        num_tokens = _num_tokens_taken(submission)
        if tokens is not None and num_tokens > tokens.num_per_minute:
            raise OutOfRangeError(
                "EXCEEDS_RATE",
                f"the request may use {num_tokens} tokens; tenant {tenant!r} may use "
                f"{tokens.num_per_minute} in a minute, so ask for fewer output tokens",
                num_tokens=num_tokens,
                num_tokens_per_minute=tokens.num_per_minute,
            )
        requests_wait_ns = 0 if requests is None else requests.wait_ns(1, now_ns)
        tokens_wait_ns = 0 if tokens is None else tokens.wait_ns(num_tokens, now_ns)
        wait_ns = max(requests_wait_ns, tokens_wait_ns)
        if wait_ns:
            limits = _figures("requests", requests, now_ns) | _figures("tokens", tokens, now_ns)
            what = "requests" if requests_wait_ns >= tokens_wait_ns else "tokens"
            raise ResourceExhaustedError(
                "RATE_LIMITED",
                f"tenant {tenant!r} has used up its {limits[f'num_{what}_per_minute']} {what} in a "
                f"minute; come again in {wait_ns / NANOSECONDS_PER_SECOND:.3f} s",
                retry_after_s=f"{ceil_div(wait_ns, 1_000_000) / 1000:.3f}",
                **limits,
            )

    def charge(self, request: "Request", now_ns: int) -> None:
        """``request`` begins: take what it may use."""
        submission = request.submission
        requests = self._requests.get(submission.tenant)
        tokens = self._tokens.get(submission.tenant)
        if requests is not None and not submission.is_resubmitted:
            requests.take(1, now_ns)
        if tokens is not None:
            tokens.take(_num_tokens_taken(submission), now_ns)
            request.is_rated = True

    def levels(self, tenant: str, now_ns: int) -> RateLevels:
        """How full a tenant's buckets are; nothing for one without rates."""
        buckets = {"requests": self._requests.get(tenant), "tokens": self._tokens.get(tenant)}
        return {
            what: bucket.level(now_ns) for what, bucket in buckets.items() if bucket is not None
        }

    def settle(self, request: "Request") -> None:
        """``request`` is over: give back the output tokens that it did not use.

        A search computes whatever its beams need, and gives nothing back.
        """
        submission = request.submission
        tokens = self._tokens.get(submission.tenant)
        if tokens is None or not request.is_rated or submission.beams is not None:
            return
        num_used = sum(len(sequence.output) for sequence in request.sequences)
        tokens.give_back(_num_output_tokens_max(submission) - num_used)


def _changed(
    buckets: dict[str, Bucket], num_per_minute: dict[str, int], now_ns: int
) -> dict[str, Bucket]:
    changed: dict[str, Bucket] = {}
    for tenant, number in num_per_minute.items():
        if not number:
            continue
        bucket = buckets.get(tenant)
        if bucket is None:
            bucket = Bucket(number, now_ns)
        elif bucket.num_per_minute != number:
            bucket.change(number, now_ns)
        changed[tenant] = bucket
    return changed


def _num_output_tokens_max(submission: Submission) -> int:
    num_outputs = submission.num_sequences * submission.num_running
    return num_outputs * submission.sampling.max_tokens


def _num_tokens_taken(submission: Submission) -> int:
    """Tokens that a request may use, once for all samples of one prompt.

    One that was sent before has its prompt paid for, and the output that it brings along.
    """
    num_tokens = _num_output_tokens_max(submission)
    if submission.is_resubmitted:
        return num_tokens - sum(map(len, submission.resume_token_ids))
    return num_tokens + len(submission.prompt_token_ids)


def _figures(what: str, bucket: Bucket | None, now_ns: int) -> dict[str, object]:
    if bucket is None:
        return {}
    level = bucket.level(now_ns)
    return {
        f"num_{what}_per_minute": level.num_per_minute,
        f"num_{what}_left": level.num_left,
        f"{what}_full_after_s": f"{level.full_after_ns / NANOSECONDS_PER_SECOND:.3f}",
    }
