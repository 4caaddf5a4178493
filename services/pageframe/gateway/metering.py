"""What a gateway counts: requests, waits and tokens; read when somebody asks for metrics.

Counted once for each output that leaves, and once when a request ends, from the accounts of its
samples; nothing is counted for each token.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from pageframe.core.errors import PageframeError
from pageframe.core.request import Completion, StallCause
from pageframe.core.units import NANOSECONDS_PER_SECOND
from pageframe.gateway.mailbox import Pending
from pageframe.telemetry import metrics
from pageframe.telemetry.metrics import BoundedNames, Histogram, Metric, Reading

_OK, _CLIENT_GONE = "ok", "client_gone"


class RequestTimes:
    """When the samples of one request had their last tokens."""

    __slots__ = ("arrival_ns", "last_ns")

    def __init__(self, arrival_ns: int) -> None:
        self.arrival_ns = arrival_ns
        self.last_ns: dict[int, int] = {}


class GatewayMeter:
    """The counts of one gateway process."""

    def __init__(self) -> None:
        self._tenants = BoundedNames()
        self._ttft = Histogram(metrics.TTFT_BOUNDS)
        self._inter_token = Histogram(metrics.INTER_TOKEN_BOUNDS)
        self._request = Histogram(metrics.REQUEST_BOUNDS)
        self._requests: Counter[tuple[str, str]] = Counter()
        self._tenant_tokens: dict[Metric, Counter[str]] = {
            metric: Counter()
            for metric in (metrics.PROMPT_TOKENS, metrics.CACHED_TOKENS, metrics.OUTPUT_TOKENS)
        }
        self._stall_ns: dict[StallCause, int] = dict.fromkeys(StallCause, 0)
        self._totals: dict[Metric, int] = {
            metrics.COPIES_ON_WRITE: 0,
            metrics.DRAFT_TOKENS: 0,
            metrics.ACCEPTED_TOKENS: 0,
        }
        self._compute_ns = 0

    def take(self, times: RequestTimes, pending: Mapping[int, Pending], now_ns: int) -> None:
        """Tokens leave the gateway now; for requests whose tokens are delivered as they come."""
        for sample_index, part in pending.items():
            num_tokens = len(part.token_ids)
            if not num_tokens:
                continue
            last_ns = times.last_ns.get(sample_index)
            if last_ns is not None:
                self._inter_token.observe(_seconds(now_ns - last_ns) / num_tokens, num_tokens)
            elif not times.last_ns:
                self._ttft.observe(_seconds(now_ns - times.arrival_ns))
            times.last_ns[sample_index] = now_ns

    def end(
        self,
        tenant: str,
        completions: Iterable[Completion],
        elapsed_ns: int,
        error: BaseException | None,
    ) -> None:
        """A request has ended, well or with an error."""
        label = self._tenants.of(tenant)
        ended = list(completions)
        self._requests[label, _outcome(error)] += 1
        if error is None:
            self._request.observe(_seconds(elapsed_ns))
            first = max(ended, key=lambda item: item.num_cached_tokens, default=None)
            if first is not None:
                self._tenant_tokens[metrics.PROMPT_TOKENS][label] += first.num_prompt_tokens
                self._tenant_tokens[metrics.CACHED_TOKENS][label] += first.num_cached_tokens
        for completion in ended:
            self._tenant_tokens[metrics.OUTPUT_TOKENS][label] += completion.num_output_tokens
            self._add_account(completion)

    def read(self, num_living: int) -> Iterator[Reading]:
        """All values now."""
        yield Reading(metrics.LIVING_REQUESTS, num_living)
        yield Reading(metrics.TTFT, self._ttft)
        yield Reading(metrics.INTER_TOKEN, self._inter_token)
        yield Reading(metrics.REQUEST_SECONDS, self._request)
        for labels, count in self._requests.items():
            yield Reading(metrics.REQUESTS, count, labels)
        for metric, counts in self._tenant_tokens.items():
            for tenant, count in counts.items():
                yield Reading(metric, count, (tenant,))
        for cause, stall_ns in self._stall_ns.items():
            yield Reading(metrics.STALL_SECONDS, _seconds(stall_ns), (cause.name.lower(),))
        yield Reading(metrics.COMPUTE_SECONDS, _seconds(self._compute_ns))
        for metric, total in self._totals.items():
            yield Reading(metric, total)

    def _add_account(self, completion: Completion) -> None:
        for cause, stall_ns in completion.stall_ns.items():
            self._stall_ns[cause] += stall_ns
        self._compute_ns += completion.compute_ns
        account = completion.account
        self._totals[metrics.COPIES_ON_WRITE] += account.num_copies_on_write
        self._totals[metrics.DRAFT_TOKENS] += account.num_draft_tokens
        self._totals[metrics.ACCEPTED_TOKENS] += account.num_accepted_tokens


def _outcome(error: BaseException | None) -> str:
    if error is None:
        return _OK
    return error.reason.lower() if isinstance(error, PageframeError) else _CLIENT_GONE


def _seconds(nanoseconds: int) -> float:
    return nanoseconds / NANOSECONDS_PER_SECOND
