"""``pageframe stalls`` over a small file."""

import json

import pytest

from pageframe.cli.main import main
from unit.telemetry.test_stall_report import SPANS


def otlp(span) -> dict:
    def value(item):
        return {"doubleValue": item} if isinstance(item, float) else {"stringValue": item}

    return {
        "traceId": span.trace_id.hex(),
        "spanId": f"{span.span_id:016x}",
        "parentSpanId": f"{span.parent_span_id:016x}",
        "name": span.name,
        "startTimeUnixNano": str(span.start_ns),
        "endTimeUnixNano": str(span.end_ns),
        "attributes": [{"key": key, "value": value(item)} for key, item in span.attributes.items()],
        "links": [
            {"traceId": trace_id.hex(), "spanId": f"{span_id:016x}"}
            for trace_id, span_id in span.links
        ],
    }


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "trace.jsonl"
    spans = [otlp(span) for span in SPANS]
    request = {"resourceSpans": [{"scopeSpans": [{"spans": spans}]}]}
    path.write_text(json.dumps(request) + "\n", encoding="utf-8")
    return str(path)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["stalls", *arguments])
    return ended.value.code or 0


def test_people_see_causes_tenants_and_culprits(file, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert run(file) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 requests, 0.240 s in all, 25.2% of it waiting"
    (row,) = [line.split() for line in lines if line.strip().startswith("preempted")]
    assert row == ["preempted", "30.0", "ms", "12.5%", "1", "30.0", "ms", "victim"]
    assert any(line.split()[:3] == ["long", "a", "2"] for line in lines)


def test_machines_read_everything(file, capsys):
    assert run(file, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["causes"]["queue"]["total_ms"] == 10.0
    assert told["tenants"]["b"] == {"kv_full": 20.0, "unexplained": 0.5}
    assert [entry["request_id"] for entry in told["requests"]] == ["long", "victim", "other"]
    assert told["culprits"][0]["num_victims"] == 2


def test_one_request_is_told_wait_by_wait(file, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert run(file, "--request", "victim") == 0
    (row,) = [line.split() for line in capsys.readouterr().out.splitlines() if "+10.0" in line]
    assert row == ["+10.0", "ms", "preempted", "30.0", "ms", "long"]


def test_a_request_that_is_not_there_is_one_line(file, capsys):
    assert run(file, "--request", "nobody") == 2
    assert "no finished request 'nobody' among the 3" in capsys.readouterr().err


def test_a_tenant_without_requests_is_a_failure(file):
    assert run(file, "--tenant", "nobody") == 1


def test_a_file_that_is_not_there_is_one_line(tmp_path, capsys):
    assert run(str(tmp_path / "none.jsonl")) == 2
    assert "there is no trace at" in capsys.readouterr().err
