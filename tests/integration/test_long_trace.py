"""A request with more operations than a trace may have spans: linked parts, and nothing lost."""

from collections import Counter
from collections.abc import Callable

import pytest

from integration import models
from integration.system import System
from pageframe.client import GenerationRequest, GenerationResult
from pageframe.core.trace import SpanKind, child_span_id, decode_segment
from pageframe.telemetry import spans as names
from pageframe.telemetry.pool_rebuild import RebuiltPool
from pageframe.telemetry.reader import Span, join_parts
from pageframe.telemetry.render import render_trace
from pageframe.telemetry.stall_report import stall_report

NUM_SPANS_MAX = 10_000
NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS = 200, 5_400


@pytest.fixture(scope="module")
def long_run(
    start: Callable[..., System], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Span], GenerationResult]:
    """One token a block: each is allocated and indexed by an operation of its own."""
    folder = tmp_path_factory.mktemp("models") / "long"
    models.write_config_and_tokenizer(folder, max_model_len=8_192)
    system = start(
        folder,
        *("--sim-step", "0", "--trace", "audit", "--block-size", "1", "--num-blocks", "6000"),
    )
    result = system.complete(
        GenerationRequest(
            token_ids=[5] * NUM_PROMPT_TOKENS,
            max_tokens=NUM_OUTPUT_TOKENS,
            ignore_eos=True,
            request_id="long",
        )
    )
    system.settle()
    system.stop()
    return system.spans(), result


def operations(spans: list[Span]) -> list[Span]:
    return [span for span in spans if names.KV_OPERATION in span.attributes]


def test_no_trace_has_more_than_ten_thousand_spans(
    long_run: tuple[list[Span], GenerationResult],
) -> None:
    spans, result = long_run
    assert len(operations(spans)) > NUM_SPANS_MAX
    sizes = Counter(span.trace_id.hex() for span in spans)
    assert max(sizes.values()) <= NUM_SPANS_MAX, sizes.most_common(3)
    continuations = [span for span in spans if span.name == names.CONTINUATION]
    assert {span.attributes[names.TRACE_CONTINUES] for span in continuations} == {
        result.started.trace_id
    }
    known = {(span.trace_id, span.span_id) for span in spans}
    ends = [span for span in spans if span.name == names.CONTINUED]
    assert len(ends) == len(continuations) > 0
    assert {link for span in (*ends, *continuations) for link in span.links} <= known


def test_every_span_hangs_under_a_span_of_its_own_trace(
    long_run: tuple[list[Span], GenerationResult],
) -> None:
    spans, _ = long_run
    known = {(span.trace_id, span.span_id) for span in spans}
    orphans = [
        span
        for span in spans
        if span.parent_span_id and (span.trace_id, span.parent_span_id) not in known
    ]
    assert not orphans, render_trace(orphans[:3])


def test_put_together_it_is_the_one_trace_that_it_would_have_been(
    long_run: tuple[list[Span], GenerationResult],
) -> None:
    spans, result = long_run
    joined = join_parts(spans)
    trace = [span for span in joined if span.trace_id.hex() == result.started.trace_id]
    assert len(trace) > NUM_SPANS_MAX
    (sequence,) = [span for span in trace if span.name == names.SEQUENCE]
    decoding = [span for span in trace if span.attributes.get(names.KV_CAUSE) == "decode"]
    assert len(decoding) == NUM_OUTPUT_TOKENS - 1, "the last token is sampled and never computed"
    for span in decoding:
        segment = decode_segment(int(span.attributes[names.KV_POSITION]))
        assert span.parent_span_id == child_span_id(sequence.span_id, SpanKind.DECODE, 0, segment)


def test_the_pool_is_rebuilt_and_the_time_adds_up_over_all_parts(
    long_run: tuple[list[Span], GenerationResult],
) -> None:
    spans, _ = long_run
    rebuilt = RebuiltPool.of(spans)
    assert rebuilt.faults == []
    assert {block.state for block in rebuilt.blocks.values()} <= {"free", "cached"}
    report = stall_report(spans)
    assert (len(report.requests), report.num_unfinished) == (1, 0)
    (entry,) = report.requests
    assert entry.stall_ms.get("unexplained", 0.0) <= max(1.0, 0.02 * entry.elapsed_ms)
