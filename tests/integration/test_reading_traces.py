"""The stalls of `docs/reading-traces.md`: each can be provoked, and its trace says what it must."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench.reading_traces.picture import picture_of
from bench.reading_traces.provocations import PROVOCATIONS, Outcome, command_of, find, provoke
from bench.reading_traces.verdict import faults_of
from pageframe.telemetry import spans as names

DOCUMENT = Path(__file__).parents[2] / "docs" / "reading-traces.md"
NAMES = [provocation.name for provocation in PROVOCATIONS]


@pytest.fixture(scope="module", params=NAMES)
def outcome(request: pytest.FixtureRequest, sim_model: Path) -> Outcome:
    return provoke(find(request.param), str(sim_model))


def test_the_stall_has_its_cause_its_culprit_and_all_time_is_explained(outcome: Outcome) -> None:
    assert faults_of(outcome) == []


def test_no_span_hangs_in_the_air(outcome: Outcome) -> None:
    """But for what an executor did that died before it could tell: nobody knows of those steps."""
    known = {(span.trace_id, span.span_id) for span in outcome.spans}
    last_step: dict[int, int] = {}
    for span in outcome.spans:
        if names.KV_STEP in span.attributes:
            incarnation = span.attributes[names.KV_POOL_INCARNATION]
            step = max(last_step.get(incarnation, 0), span.attributes[names.KV_STEP])
            last_step[incarnation] = step
    lost = {}
    if outcome.provocation.name == "executor-restart":
        incarnation = min(last_step)
        lost = {incarnation: {last_step[incarnation], last_step[incarnation] - 1}}
    orphans = [
        (span.name, span.attributes)
        for span in outcome.spans
        if span.parent_span_id
        and (span.trace_id, span.parent_span_id) not in known
        and span.attributes.get(names.KV_STEP)
        not in lost.get(span.attributes.get(names.KV_POOL_INCARNATION, 0), ())
    ]
    assert orphans == []


def test_the_picture_shows_the_stall_and_for_whose_sake_it_was(outcome: Outcome) -> None:
    picture = ElementTree.fromstring(picture_of(outcome))
    texts = [element.text or "" for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    culprit = outcome.provocation.culprit
    told = f"{outcome.provocation.cause} → {culprit}" if culprit else outcome.provocation.cause
    assert told in texts
    assert sum(text.startswith("generate") for text in texts) == (2 if culprit else 1)


def test_what_the_recovery_cost_is_in_the_trace(outcome: Outcome) -> None:
    """A victim's `preempt` span, or chunks that are computed again, with the reason."""
    victim = outcome.trace_of(outcome.provocation.victim)
    match outcome.provocation.name:
        case "preempted" | "swap-in":
            (preempt,) = [span for span in victim if span.name == names.PREEMPT]
            mode = "swap" if outcome.provocation.name == "swap-in" else "recompute"
            assert preempt.attributes[names.PREEMPT_MODE] == mode
            assert preempt.attributes[names.PREEMPT_NUM_BLOCKS] > 0
            assert ("kv.swap_in" in {span.name for span in victim}) == (mode == "swap")
        case "executor-restart":
            again = [
                span
                for span in victim
                if span.name == names.PREFILL and names.STALL_CAUSE in span.attributes
            ]
            assert [span.attributes[names.STALL_CAUSE] for span in again] == ["executor_lost"]
            incarnations = {
                span.attributes[names.KV_POOL_INCARNATION]
                for span in victim
                if names.KV_POOL_INCARNATION in span.attributes
            }
            assert len(incarnations) == 2, "before and after"
        case _:
            assert not [span for span in victim if span.name == names.PREEMPT]


@pytest.mark.parametrize("name", NAMES)
def test_the_document_says_how_to_provoke_it_and_how_to_find_it(name: str) -> None:
    provocation = find(name)
    document = DOCUMENT.read_text(encoding="utf-8")
    (section,) = re.findall(
        rf"^## [^\n]*\n(?=[^#]*images/trace-{name}\.svg)(.*?)(?=^## |\Z)",
        document,
        re.M | re.S,
    )
    flat = re.sub(r"\s*\\\n\s*", " ", section)
    assert " ".join(command_of(provocation)) in flat
    assert f"make trace-pictures ARGS={name}" in section
    tags = f"{names.STALL_CAUSE}={provocation.cause} {names.TENANT}={provocation.victim}"
    assert tags in section
