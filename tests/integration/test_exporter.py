"""The exporter as a real process: files, a real OTLP receiver, signals, deaths, full buffers."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto_json.collector.trace.v1.trace_service import (
    ExportTraceServiceRequest as JsonExportTraceServiceRequest,
)

from pageframe.core.trace import (
    KvCause,
    KvOperation,
    SpanKind,
    TraceMode,
    child_span_id,
    decode_segment,
)
from pageframe.telemetry.context import span_id_to_bytes
from pageframe.telemetry.process import ProcessIdentity
from pageframe.telemetry.reader import read_spans
from pageframe.telemetry.render import render_trace
from pageframe.telemetry.sink import RingTraceSink
from pageframe.telemetry.supervise import EXPORTER_MODULE, exporter_arguments

TIMEOUT_S = 60.0
TRACE_ID = bytes(range(1, 17))
GENERATE, SEQUENCE = 0x11, child_span_id(0x11, SpanKind.SEQUENCE, 0, 0)
REQUEST_BYTES_MAX = 2 * 1024 * 1024


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, "gave up waiting"
        time.sleep(0.01)


def environment(**variables: str) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("OTEL_")}
    proxies = {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    return inherited | proxies | variables


def make_sink(
    path: Path, service: str, mode: TraceMode = TraceMode.ALL, **options
) -> RingTraceSink:
    sink = RingTraceSink.create(path, service, mode, **options)
    assert isinstance(sink, RingTraceSink)
    return sink


def record_kv(sink, operation=KvOperation.ALLOCATE, cause=KvCause.DECODE, **fields):
    defaults = {
        "sequence_id": 0,
        "generation": 0,
        "position": 0,
        "step": 1,
        "block_ids": [1],
        "num_free_after": 9,
    }
    sink.kv(operation, cause, **(defaults | fields))


def record_span(sink, name, span_id, parent_span_id, start_ns=10, end_ns=1000, **attributes):
    sink.span(
        name,
        trace_id=TRACE_ID,
        span_id=span_id,
        parent_span_id=parent_span_id,
        start_ns=start_ns,
        end_ns=end_ns,
        attributes=attributes,
    )


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """A collector: keeps every request; answers on a port that stays its own while it is down."""

    def __init__(self) -> None:
        self.requests: list[trace_service_pb2.ExportTraceServiceRequest] = []
        self.headers: set[tuple[str, str]] = set()
        self.port = 0
        self._server: grpc.Server | None = None

    def Export(self, request, context):  # noqa: N802, the name is given by the protocol
        self.headers |= set(context.invocation_metadata())
        self.requests.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()

    def start(self) -> None:
        self._server = grpc.server(ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self._server.start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop(None).wait()
            self._server = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def spans(self):
        return [
            (resource_spans.resource, span)
            for request in self.requests
            for resource_spans in request.resource_spans
            for scope_spans in resource_spans.scope_spans
            for span in scope_spans.spans
        ]

    def operations(self) -> list[int]:
        return [
            attribute.value.int_value
            for _, span in self.spans()
            for attribute in span.attributes
            if attribute.key == "kv.operation"
        ]


class ExporterProcess:
    """The exporter, as a supervisor would run it."""

    def __init__(self, rings, state_dir, variables: dict[str, str]) -> None:
        arguments = exporter_arguments(rings, state_dir, parent_pid=os.getpid())
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", EXPORTER_MODULE, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=variables,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self.pid = self._process.pid

    def is_running(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> int:
        """Ask it to drain and end; its exit code."""
        self._process.terminate()
        return self._process.wait(TIMEOUT_S)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def receiver():
    receiver = Receiver()
    receiver.start()
    yield receiver
    receiver.stop()


@pytest.fixture
def started():
    """Starts exporters and leaves none behind."""
    processes: list[ExporterProcess] = []

    def start(rings, state_dir, **variables: str) -> ExporterProcess:
        processes.append(ExporterProcess(rings, state_dir, environment(**variables)))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()


def test_three_services_become_one_trace_in_a_file(tmp_path, started):
    services = ("pageframe-gateway", "pageframe-scheduler", "pageframe-executor")
    rings = [tmp_path / f"{service}.ring" for service in services]
    process = started(rings, tmp_path / "state")
    gateway, scheduler, executor = map(make_sink, rings, services)
    prefill = child_span_id(SEQUENCE, SpanKind.PREFILL, 0, 0)
    decode = child_span_id(SEQUENCE, SpanKind.DECODE, 0, decode_segment(130))
    executor.sequence_begin(
        1,
        trace_id=TRACE_ID,
        span_id=span_id_to_bytes(SEQUENCE),
        request_id="r",
        tenant="acme",
    )
    many = list(range(3000))
    record_kv(executor, cause=KvCause.PREFILL, sequence_id=1, block_ids=many)
    record_kv(executor, sequence_id=1, position=130, block_ids=[4000])
    record_kv(executor, KvOperation.FREE, KvCause.FINISHED, sequence_id=1, block_ids=many)
    executor.sequence_end(1)
    record_kv(executor, KvOperation.FENCE_CLEAR, KvCause.STEP_COMPLETED)
    record_span(scheduler, "prefill", prefill, SEQUENCE)
    record_span(scheduler, "decode", decode, SEQUENCE)
    record_span(scheduler, "sequence", SEQUENCE, GENERATE)
    record_span(gateway, "generate", GENERATE, 0, **{"pageframe.tenant": "acme"})
    for sink in (gateway, scheduler, executor):
        sink.close()
    assert process.stop() == 0

    file = tmp_path / "state" / "traces" / "pageframe.jsonl"
    for line in file.read_text().splitlines():
        assert JsonExportTraceServiceRequest.from_dict(json.loads(line)).resource_spans
    spans = read_spans(file)
    trace = {(span.name, span.parent_span_id): span for span in spans if span.trace_id == TRACE_ID}
    assert set(trace) == {
        ("generate", 0),
        ("sequence", GENERATE),
        ("prefill", SEQUENCE),
        ("decode", SEQUENCE),
        ("kv.allocate", prefill),
        ("kv.allocate", decode),
        ("kv.free", SEQUENCE),
    }
    assert trace["kv.allocate", prefill].attributes["kv.block_ids"] == tuple(many)
    assert trace["kv.allocate", decode].attributes["kv.tenant"] == "acme"
    assert trace["generate", 0].service == "pageframe-gateway"
    assert trace["sequence", GENERATE].service == "pageframe-scheduler"
    assert trace["kv.free", SEQUENCE].service == "pageframe-executor"
    assert {span.name for span in spans if span.trace_id != TRACE_ID} == {"pool", "kv.fence_clear"}
    text = render_trace([span for span in spans if span.trace_id == TRACE_ID])
    assert "kv.allocate" in text
    assert "blocks=0-2999 (3000)" in text
    assert not any(ring.exists() for ring in rings), "rings of ended services are removed"


def test_the_collector_gets_everything_with_the_standard_headers(tmp_path, started, receiver):
    ring = tmp_path / "ring"
    sink = make_sink(ring, "pageframe-executor")
    process = started(
        [ring],
        tmp_path / "state",
        OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint,
        OTEL_EXPORTER_OTLP_HEADERS="x-team=serving",
        OTEL_RESOURCE_ATTRIBUTES="deployment.environment=test",
        OTEL_SERVICE_NAME="somebody-else",
    )
    for _ in range(1000):
        record_kv(sink, block_ids=list(range(200)))
    wait_until(lambda: len(receiver.operations()) == 1000)
    assert process.stop() == 0
    assert sorted(receiver.operations()) == list(range(1, 1001))
    assert all(request.ByteSize() < REQUEST_BYTES_MAX for request in receiver.requests)
    assert ("x-team", "serving") in receiver.headers
    resource, _ = receiver.spans()[0]
    attributes = {item.key: item.value.string_value for item in resource.attributes}
    assert attributes["service.name"] == "pageframe-executor"
    assert attributes["deployment.environment"] == "test"
    assert list((tmp_path / "state" / "spool").iterdir()) == []
    assert not (tmp_path / "state" / "traces").exists()


def test_a_collector_that_was_away_gets_everything_when_it_is_back(tmp_path, started, receiver):
    receiver.stop()
    ring = tmp_path / "ring"
    sink = make_sink(ring, "pageframe-executor", capacity_bytes=64 * 1024)
    spool = tmp_path / "state" / "spool"
    process = started([ring], tmp_path / "state", OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint)
    # Far more than the ring holds: the spool must take it while the collector is away.
    for _ in range(8):
        tail = sink._ring.tail
        for _ in range(250):
            record_kv(sink)
        wait_until(lambda tail=tail: sink._ring.tail > tail)
    wait_until(lambda: len(list(spool.iterdir())) > 1)
    assert receiver.requests == []
    receiver.start()
    wait_until(lambda: len(set(receiver.operations())) == 2000)
    for _ in range(10):
        record_kv(sink)
    sink.close()
    assert process.stop() == 0
    assert set(receiver.operations()) == set(range(1, 2011))
    assert len(receiver.operations()) == 2010, "each request is taken once"
    assert list(spool.iterdir()) == []


def test_what_a_stopped_exporter_could_not_send_is_sent_by_the_next(tmp_path, started, receiver):
    receiver.stop()
    ring = tmp_path / "ring"
    sink = make_sink(ring, "pageframe-executor")
    for _ in range(5):
        record_kv(sink)
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint}
    first = started([ring], tmp_path / "state", **variables)
    wait_until(lambda: sink._ring.tail > 0)
    assert first.stop() == 0
    receiver.start()
    started([ring], tmp_path / "state", **variables)
    wait_until(lambda: set(receiver.operations()) == set(range(1, 6)))


def test_a_killed_exporter_is_followed_by_one_that_loses_nothing(tmp_path, started):
    ring = tmp_path / "ring"
    sink = make_sink(ring, "pageframe-executor")
    traces = tmp_path / "state" / "traces"

    def operations() -> set[int]:
        spans = read_spans(traces) if traces.exists() else []
        return {s.attributes["kv.operation"] for s in spans if "kv.operation" in s.attributes}

    first = started([ring], tmp_path / "state")
    for _ in range(100):
        record_kv(sink)
    wait_until(lambda: bool(operations()))
    for _ in range(3000):
        record_kv(sink)
    os.kill(first.pid, signal.SIGKILL)
    wait_until(lambda: not first.is_running())
    second = started([ring], tmp_path / "state")
    sink.close()
    assert second.stop() == 0
    assert operations() == set(range(1, 3101))


def test_the_death_of_the_parent_drains_the_rings_and_ends_the_exporter(tmp_path):
    """A supervisor that is killed leaves neither records nor a process behind."""
    ring, state_dir = tmp_path / "ring", tmp_path / "state"
    program = textwrap.dedent(
        f"""
        import sys, time
        from pathlib import Path
        sys.path[:0] = {[str(Path(__file__).parent)]!r}
        from test_exporter import environment, make_sink, record_kv, ExporterProcess
        sink = make_sink(Path({str(ring)!r}), "pageframe-executor")
        process = ExporterProcess(
            [Path({str(ring)!r})], Path({str(state_dir)!r}), environment()
        )
        print(process.pid, flush=True)
        sys.stdin.readline()
        for _ in range(1000):
            record_kv(sink)
        print("recorded", flush=True)
        time.sleep(600)
        """
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    exporter = ProcessIdentity.of(int(parent.stdout.readline()))
    wait_until(lambda: (state_dir / "traces" / "pageframe.jsonl").exists())
    parent.stdin.write("go\n")
    parent.stdin.flush()
    assert parent.stdout.readline() == "recorded\n"
    parent.kill()
    parent.wait()
    parent.stdin.close()
    parent.stdout.close()
    wait_until(lambda: not exporter.is_alive())
    operations = [
        span.attributes["kv.operation"]
        for span in read_spans(state_dir / "traces")
        if span.name == "kv.allocate"
    ]
    assert sorted(operations) == list(range(1, 1001))
    assert not ring.exists()


def test_an_overrun_ring_shows_gaps_and_says_how_many_are_missing(tmp_path, started):
    ring = tmp_path / "ring"
    sink = make_sink(ring, "pageframe-executor", capacity_bytes=16 * 1024)
    for _ in range(1000):
        record_kv(sink)
    num_dropped = sink.num_dropped
    sink.close()
    assert started([ring], tmp_path / "state").stop() == 0
    spans = read_spans(tmp_path / "state" / "traces")
    operations = [span for span in spans if span.name == "kv.allocate"]
    (drop,) = [span for span in spans if span.name == "trace.drop"]
    assert drop.attributes["pageframe.trace.num_dropped"] == num_dropped == 1000 - len(operations)
    assert drop.trace_id == operations[0].trace_id
    assert drop.error


def test_audit_through_a_small_ring_loses_nothing(tmp_path, started):
    ring = tmp_path / "ring"
    sink = make_sink(ring, "pageframe-executor", TraceMode.AUDIT, capacity_bytes=16 * 1024)
    process = started([ring], tmp_path / "state")
    wait_until(lambda: (tmp_path / "state" / "traces").exists())
    writer = threading.Thread(target=lambda: [record_kv(sink) for _ in range(5000)])
    writer.start()
    writer.join(TIMEOUT_S)
    assert sink.num_dropped == 0
    sink.close()
    assert process.stop() == 0
    operations = [
        span.attributes["kv.operation"]
        for span in read_spans(tmp_path / "state" / "traces")
        if span.name == "kv.allocate"
    ]
    assert sorted(operations) == list(range(1, 5001))


def test_a_disabled_sdk_writes_nothing(tmp_path, started):
    ring = tmp_path / "ring"
    sink = make_sink(ring, "pageframe-executor", environment={})
    record_kv(sink)
    sink.close()
    assert started([ring], tmp_path / "state", OTEL_SDK_DISABLED="true").stop() == 0
    assert not (tmp_path / "state").exists()


def test_a_malformed_variable_is_one_line_and_exit_code_2(tmp_path):
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pageframe.telemetry"),
            *("--ring", str(tmp_path / "ring"), "--state-dir", str(tmp_path)),
        ],
        env=environment(
            OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1",
            OTEL_EXPORTER_OTLP_COMPRESSION="brotli",
        ),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "brotli" in json.loads(line)["error"]


@pytest.mark.parametrize(
    "options",
    [
        ["--seconds", "2"],
        ["--seconds", "3", "--rate", "30000", "--collector-away", "2"],
        ["--seconds", "2", "--rate", "20000", "--mode", "audit"],
    ],
    ids=["all", "collector-away", "audit"],
)
def test_tens_of_thousands_of_operations_a_second_all_arrive_once(options):
    """The measurement itself, in short: it fails when an operation is lost or comes twice."""
    result = subprocess.run(
        [sys.executable, "-m", "bench.trace_throughput", *options],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=4 * TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads(result.stdout)["num_operations"] >= 40_000
