"""The exported trace says what happened: whole, linked over three services, and without a gap."""

import itertools
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from integration.system import PATIENCE_S, System
from pageframe.client import GenerationRequest, GenerationResult
from pageframe.core.request import StallCause
from pageframe.telemetry import spans as names
from pageframe.telemetry.pool_rebuild import RebuiltPool
from pageframe.telemetry.reader import Span
from pageframe.v1.gateway_service_pb2 import GenerateRequest, TokenIds
from pageframe.v1.sequence_pb2 import SamplingParameters

NUM_BLOCKS = 12
NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS = 40, 200
CALLER_TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
CALLER_SPAN_ID = "b7ad6b7169203331"


@dataclass(frozen=True, slots=True)
class Traced:
    """What an ended system left behind."""

    spans: list[Span]
    results: list[GenerationResult] = field(default_factory=list)

    def of_trace(self, trace_id: str) -> list[Span]:
        return [span for span in self.spans if span.trace_id.hex() == trace_id]


@pytest.fixture(scope="module")
def roomy(start: Callable[..., System], sim_model: Path) -> Traced:
    """One request with a caller's context, prefilled in chunks of 16, under ``--trace all``."""
    system = start(
        sim_model,
        *("--sim-step", "0", "--trace", "all", "--prefill-chunk-tokens", "16"),
        *("--num-blocks", "64", "--block-size", "16"),
    )
    request = GenerateRequest(
        token_ids=TokenIds(ids=[5] * NUM_PROMPT_TOKENS),
        sampling=SamplingParameters(max_tokens=NUM_OUTPUT_TOKENS),
        request_id="traced",
    )
    metadata = [("traceparent", f"00-{CALLER_TRACE_ID}-{CALLER_SPAN_ID}-01")]
    messages = list(system.gateway.Generate(request, metadata=metadata, timeout=PATIENCE_S))
    assert messages[0].header.trace_id == CALLER_TRACE_ID
    system.stop(signal.SIGTERM)
    return Traced(system.spans())


@pytest.fixture(scope="module")
def crowded(start: Callable[..., System], sim_model: Path) -> Traced:
    """Four requests in a pool that holds two of them, under ``--trace audit``."""
    system = start(
        sim_model,
        *("--sim-step", "1ms", "--trace", "audit"),
        *("--num-blocks", str(NUM_BLOCKS), "--block-size", "16"),
    )
    requests = [
        GenerationRequest(token_ids=[5 + index] * 20, max_tokens=70, num_samples=1 + index % 2)
        for index in range(4)
    ]
    with ThreadPoolExecutor(len(requests)) as threads:
        results = list(threads.map(system.complete, requests))
    system.settle()
    system.stop()
    return Traced(system.spans(), results)


def one(spans: Sequence[Span], name: str) -> Span:
    (found,) = [span for span in spans if span.name == name]
    return found


def tokens(spans: Sequence[Span], name: str) -> list[tuple[int, int]]:
    """The intervals of positions that spans of a name cover, in order."""
    return sorted(
        (span.attributes[names.TOKENS_BEGIN], span.attributes[names.TOKENS_END])
        for span in spans
        if span.name == name
    )


def test_a_request_is_one_trace_over_three_services(roomy: Traced) -> None:
    trace = roomy.of_trace(CALLER_TRACE_ID)
    generate, sequence = one(trace, names.GENERATE), one(trace, names.SEQUENCE)
    assert f"{generate.parent_span_id:016x}" == CALLER_SPAN_ID, "it hangs under the caller's span"
    assert generate.attributes[names.REQUEST_ID] == "traced"
    assert sequence.parent_span_id == generate.span_id
    assert one(trace, names.TOKENIZE).parent_span_id == generate.span_id
    computed = {span.span_id for span in trace if span.name in (names.PREFILL, names.DECODE)}
    assert all(
        span.parent_span_id == sequence.span_id for span in trace if span.span_id in computed
    )
    allocations = [span for span in trace if span.name == "kv.allocate"]
    assert {span.parent_span_id for span in allocations} <= computed
    assert one(trace, "kv.free").parent_span_id == sequence.span_id
    by_service = {span.name: span.service for span in trace}
    assert by_service == {
        names.GENERATE: names.SERVICE_GATEWAY,
        names.TOKENIZE: names.SERVICE_GATEWAY,
        names.SEQUENCE: names.SERVICE_SCHEDULER,
        names.STALL: names.SERVICE_SCHEDULER,
        names.PREFILL: names.SERVICE_SCHEDULER,
        names.DECODE: names.SERVICE_SCHEDULER,
        "kv.allocate": names.SERVICE_EXECUTOR,
        "kv.index": names.SERVICE_EXECUTOR,
        "kv.release": names.SERVICE_EXECUTOR,
        "kv.free": names.SERVICE_EXECUTOR,
    }


def test_the_spans_cover_every_token_once(roomy: Traced) -> None:
    trace = roomy.of_trace(CALLER_TRACE_ID)
    assert tokens(trace, names.PREFILL) == [(0, 16), (16, 32), (32, 40)]
    decodes = tokens(trace, names.DECODE)
    # The last token is sampled and never computed.
    assert (decodes[0][0], decodes[-1][1]) == (40, NUM_PROMPT_TOKENS + NUM_OUTPUT_TOKENS - 1)
    assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(decodes))
    assert all(end - begin <= 128 for begin, end in decodes)


def test_every_block_is_named_as_it_comes_and_goes(roomy: Traced) -> None:
    trace = roomy.of_trace(CALLER_TRACE_ID)
    allocated = [
        block_id
        for span in trace
        if span.name == "kv.allocate"
        for block_id in span.attributes[names.KV_BLOCK_IDS]
    ]
    assert len(allocated) == len(set(allocated)) == 15, "239 positions in blocks of 16"
    indexed = [
        block_id
        for span in trace
        if span.name == "kv.index"
        for block_id in span.attributes[names.KV_BLOCK_IDS]
    ]
    # The last block is not full: nobody can find it, so it is free again. The others stay cached.
    assert indexed == allocated[:14]
    assert set(one(trace, "kv.release").attributes[names.KV_BLOCK_IDS]) == set(allocated)
    assert list(one(trace, "kv.free").attributes[names.KV_BLOCK_IDS]) == allocated[14:]
    assert one(trace, "kv.free").attributes[names.KV_BLOCKS_FREE_AFTER] == 64 - 14


def operations(traced: Traced) -> list[Span]:
    """KV operations in the order in which they happened."""
    found = [span for span in traced.spans if names.KV_OPERATION in span.attributes]
    return sorted(found, key=lambda span: span.attributes[names.KV_OPERATION])


@pytest.mark.parametrize("name", ["roomy", "crowded"])
def test_operations_are_numbered_without_a_gap(name: str, request: pytest.FixtureRequest) -> None:
    found = operations(request.getfixturevalue(name))
    numbers = [span.attributes[names.KV_OPERATION] for span in found]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len({span.attributes[names.KV_POOL_INCARNATION] for span in found}) == 1


@pytest.mark.parametrize("name", ["roomy", "crowded"])
def test_replaying_the_operations_rebuilds_the_pool(
    name: str, request: pytest.FixtureRequest
) -> None:
    rebuilt = RebuiltPool.of(operations(request.getfixturevalue(name)))
    assert rebuilt.faults == []
    states = {block.state for block in rebuilt.blocks.values()}
    assert states <= {"free", "cached"}, "nobody holds anything any more"
    assert all(block.is_indexed == (block.state == "cached") for block in rebuilt.blocks.values())


def test_a_pool_that_is_too_small_shows_who_gave_way_and_why_others_waited(
    crowded: Traced,
) -> None:
    preempts = [span for span in crowded.spans if span.name == names.PREEMPT]
    assert preempts
    sequences = {
        span.attributes[names.SEQUENCE_ID]: span
        for span in crowded.spans
        if span.name == names.SEQUENCE
    }
    for span in preempts:
        victim = sequences[span.attributes[names.PREEMPT_VICTIM]]
        assert (span.trace_id, span.parent_span_id) == (victim.trace_id, victim.span_id)
        assert span.attributes[names.PREEMPT_MODE] in {"recompute", "tail"}
        assert span.attributes[names.PREEMPT_ESTIMATE_MS] >= 0
        assert span.attributes[names.PREEMPT_ACTUAL_MS] >= 0
        beneficiary = sequences[span.attributes[names.PREEMPT_BENEFICIARY]]
        assert span.links == ((beneficiary.trace_id, beneficiary.span_id),)
    stalls = [span for span in crowded.spans if span.name == names.STALL]
    causes = {span.attributes[names.STALL_CAUSE] for span in stalls}
    assert {"preempted", "kv_full"} & causes, causes
    assert {span.parent_span_id for span in stalls} <= {span.span_id for span in sequences.values()}


def test_the_account_agrees_with_the_trace(crowded: Traced) -> None:
    for result in crowded.results:
        trace = crowded.of_trace(result.started.trace_id)
        assert one(trace, names.GENERATE).parent_span_id == 0
        num_preempts = sum(span.name == names.PREEMPT for span in trace)
        accounts = [sample.account for sample in result.samples]
        assert num_preempts == sum(account.num_preemptions for account in accounts)
        # Waits have spans of their own; a chunk that is computed again says for what reason.
        traced_ns: Counter[str] = Counter()
        for span in trace:
            if names.STALL_CAUSE in span.attributes:
                cause = str(span.attributes[names.STALL_CAUSE])
                traced_ns[cause] += span.end_ns - span.start_ns
        accounted_ns: Counter[str] = Counter()
        for account in accounts:
            for stall, waited_ns in account.stall_ns.items():
                if stall not in (StallCause.TRANSPORT, StallCause.UNEXPLAINED):
                    accounted_ns[stall.name.lower()] += waited_ns
        assert traced_ns == accounted_ns


@pytest.fixture(scope="module")
def untraced(start: Callable[..., System], sim_model: Path) -> System:
    """Nothing is traced, and every proxy variable names an address where nobody listens."""
    nobody = "http://127.0.0.1:9"
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "grpc_proxy", "HTTPS_PROXY"), nobody)
    return start(sim_model, "--trace", "off", "--sim-step", "0", **proxies, no_proxy="")


def test_no_trace_when_it_is_off_and_no_proxy_stands_between(untraced: System) -> None:
    result = untraced.complete(GenerationRequest(token_ids=[3, 4], max_tokens=20))
    assert len(result.samples[0].token_ids) == 20
    assert result.started.trace_id == ""
    untraced.stop()
    assert not (untraced.state_dir / "traces").exists()
    assert untraced.spans() == []
