"""Whether tracing keeps up, and loses nothing: producer, exporter, collector, each its own process.

    producer ──ring──▶ exporter ──spool──▶ gRPC ──▶ collector
    50,000 KV operations a second           (may be away for a while)

The producer is this process. It records operations on one to four blocks at an even rate, as an
executor does under ``--trace all``. The exporter is the real one. The collector counts which
operation numbers have come. In the end none may be missing and none may have come twice::

    python -m bench.trace_throughput --seconds 60
    python -m bench.trace_throughput --seconds 70 --collector-away 60

The result is one JSON object on standard output; the exit code is 1 when something was lost.
"""

import argparse
import contextlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from pageframe.core.trace import KvCause, KvOperation, TraceMode
from pageframe.telemetry.batch_encoder import REQUEST_BYTES_MAX
from pageframe.telemetry.ring_path import ring_path
from pageframe.telemetry.sink import RingTraceSink
from pageframe.telemetry.spool import SPOOL_BYTES_DEFAULT
from pageframe.telemetry.supervise import EXPORTER_MODULE, exporter_arguments

_SERVICE = "opentelemetry.proto.collector.trace.v1.TraceService"
# The attribute kv.operation as it stands in a message; the group is the number as a varint.
_OPERATION = re.compile(rb"\x0a\x0ckv\.operation\x12.\x18([\x80-\xff]{0,9}[\x00-\x7f])", re.DOTALL)
_TICK_S = 0.001
_SAMPLE_INTERVAL_S = 1.0
_NUM_SEQUENCES = 64
_NUM_BLOCKS = 8192
_STALLED_AFTER_S = 60.0


class Counter:
    """How often each operation number came; fed with raw requests.

    Reading a message with the official classes would cost more than everything else here, so the
    numbers are found by the bytes that stand before them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = np.zeros(1 << 20, np.uint32)
        self._num_requests = 0
        self._num_bytes = 0
        self._request_bytes_max = 0
        self._num_drop_spans = 0

    def add(self, request: bytes) -> None:
        numbers = decode_varints(b"".join(_OPERATION.findall(request)))
        with self._lock:
            self._add(request, numbers)

    def _add(self, request: bytes, numbers: np.ndarray) -> None:
        self._num_requests += 1
        self._num_bytes += len(request)
        self._request_bytes_max = max(self._request_bytes_max, len(request))
        self._num_drop_spans += request.count(b"\x0atrace.drop")
        if not len(numbers):
            return
        while len(self._counts) <= int(numbers.max()):
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        np.add.at(self._counts, numbers, 1)

    def report(self) -> dict[str, int]:
        with self._lock:
            return {
                "num_operations": int(np.count_nonzero(self._counts)),
                "num_doubled": int(np.count_nonzero(self._counts > 1)),
                "num_requests": self._num_requests,
                "num_bytes": self._num_bytes,
                "request_bytes_max": self._request_bytes_max,
                "num_drop_spans": self._num_drop_spans,
            }


def decode_varints(written: bytes) -> np.ndarray:
    """The numbers of varints that follow one another."""
    octets = np.frombuffer(written, np.uint8)
    ends = np.flatnonzero(octets < 0x80)
    lengths = np.diff(ends, prepend=-1)
    starts = ends - lengths + 1
    places = np.arange(len(octets)) - np.repeat(starts, lengths)
    weighted = (octets & 0x7F).astype(np.int64) << (7 * places)
    return np.add.reduceat(weighted, starts) if len(starts) else weighted


def run_collector() -> None:
    """Obey one command a line of standard input; answer each with a line of standard output."""
    counter = Counter()

    def export(request: bytes, _context: grpc.ServicerContext) -> bytes:
        counter.add(request)
        return b""

    handlers: dict[str, Any] = {"Export": grpc.unary_unary_rpc_method_handler(export)}
    port, server = 0, None
    for line in sys.stdin:
        match line.strip():
            case "start":
                server = grpc.server(ThreadPoolExecutor(1))
                server.add_generic_rpc_handlers(
                    [grpc.method_handlers_generic_handler(_SERVICE, handlers)]
                )
                port = server.add_insecure_port(f"127.0.0.1:{port}")
                server.start()
            case "stop" if server is not None:
                server.stop(None).wait()
                server = None
        answer = {"port": port, "cpu_s": time.process_time(), **counter.report()}
        print(json.dumps(answer), flush=True)
    if server is not None:
        server.stop(None).wait()


class Collector:
    """The process that runs ``run_collector``."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--role", "collector"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._num_unanswered = 0

    def tell(self, command: str) -> None:
        """Send a command without waiting for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        self._num_unanswered += 1

    def ask(self, command: str) -> dict[str, Any]:
        """Send a command; the answer to it."""
        assert self._process.stdout is not None
        self.tell(command)
        answer = ""
        while self._num_unanswered:
            answer = self._process.stdout.readline()
            self._num_unanswered -= 1
        report: dict[str, Any] = json.loads(answer)
        return report

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Producer:
    """Records operations at an even rate."""

    def __init__(self, sink: RingTraceSink, rate: int) -> None:
        self.num_operations = 0
        self.cpu_s = 0.0
        self._sink = sink
        self._rate = rate
        rng = random.Random(1)
        for sequence_id in range(1, _NUM_SEQUENCES + 1):
            sink.sequence_begin(
                sequence_id,
                trace_id=rng.randbytes(16),
                span_id=rng.randbytes(8),
                request_id=f"request-{sequence_id}",
                tenant=f"tenant-{sequence_id % 4}",
            )
        self._operations = [_random_operation(rng) for _ in range(4096)]

    def run(self, seconds: float, on_sample: Callable[[float], None]) -> float:
        """Produce for so long; how long it took. ``on_sample`` gets the time every second."""
        begin_s = time.monotonic()
        next_sample_s = 0.0
        num_operations = round(self._rate * seconds)
        while self.num_operations < num_operations:
            elapsed_s = time.monotonic() - begin_s
            if elapsed_s >= next_sample_s:
                on_sample(elapsed_s)
                next_sample_s += _SAMPLE_INTERVAL_S
            begin_cpu_s = time.thread_time()
            self._record(min(int(elapsed_s * self._rate), num_operations) - self.num_operations)
            self.cpu_s += time.thread_time() - begin_cpu_s
            time.sleep(_TICK_S)
        return time.monotonic() - begin_s

    def _record(self, count: int) -> None:
        kv, operations = self._sink.kv, self._operations
        step = self.num_operations // 256
        for number in range(self.num_operations, self.num_operations + count):
            operation, cause, details = operations[number & 4095]
            kv(operation, cause, step=step, **details)
        self.num_operations += count


def _random_operation(rng: random.Random) -> tuple[KvOperation, KvCause, dict[str, Any]]:
    """One to four blocks; one in eight is a copy, one in eight serves nobody."""
    block_ids = [rng.randrange(_NUM_BLOCKS) for _ in range(rng.randint(1, 4))]
    details: dict[str, Any] = {
        "sequence_id": rng.choice((0, *range(1, 8))) and rng.randint(1, _NUM_SEQUENCES),
        "generation": 0,
        "position": rng.randrange(4096),
        "block_ids": block_ids,
        "num_free_after": rng.randrange(_NUM_BLOCKS),
    }
    if rng.random() < 1 / 8:
        details["target_ids"] = [rng.randrange(_NUM_BLOCKS) for _ in block_ids]
        return KvOperation.COPY_ON_WRITE, KvCause.DECODE, details
    operation = rng.choice((KvOperation.ALLOCATE, KvOperation.RELEASE, KvOperation.INDEX))
    cause = rng.choice((KvCause.PREFILL, KvCause.DECODE, KvCause.FINISHED))
    return operation, cause, details


@contextlib.contextmanager
def running_exporter(
    ring: Path, state_dir: Path, port: int, spool_bytes_max: int
) -> Iterator["subprocess.Popen[bytes]"]:
    arguments = exporter_arguments(
        [ring], state_dir, parent_pid=os.getpid(), spool_bytes_max=spool_bytes_max
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OTEL_")}
    environment |= {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
        "no_proxy": "127.0.0.1",
        "NO_PROXY": "127.0.0.1",
    }
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", EXPORTER_MODULE, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=environment,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _folder_bytes(folder: Path) -> int:
    num_bytes = 0
    if folder.exists():
        for entry in os.scandir(folder):
            with contextlib.suppress(FileNotFoundError):  # It has just been sent.
                num_bytes += entry.stat().st_size
    return num_bytes


def _wait_for(collector: Collector, num_operations: int) -> tuple[dict[str, Any], float]:
    """Wait while operations still come in; the last report, and how long it took."""
    begin_s = last_progress_s = time.monotonic()
    num_seen = -1
    while True:
        report = collector.ask("report")
        now_s = time.monotonic()
        if report["num_operations"] != num_seen:
            num_seen, last_progress_s = report["num_operations"], now_s
        if num_seen >= num_operations or now_s - last_progress_s > _STALLED_AFTER_S:
            return report, now_s - begin_s
        time.sleep(0.05)


def _collector_changes(options: argparse.Namespace) -> list[tuple[float, str]]:
    """When the collector goes and comes back: in the middle of the run."""
    if not options.collector_away:
        return []
    begin_s = max(0.0, (options.seconds - options.collector_away) / 2)
    return [(begin_s, "stop"), (begin_s + options.collector_away, "start")]


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run; everything that was counted."""
    ring, spool = ring_path(folder, os.getpid(), "executor"), folder / "state" / "spool"
    sink = RingTraceSink.create(
        ring, "pageframe-executor", TraceMode(options.mode), incarnation=time.time_ns()
    )
    assert isinstance(sink, RingTraceSink), "OTEL_SDK_DISABLED is set"
    collector, producer = Collector(), Producer(sink, options.rate)
    port = collector.ask("start")["port"]
    changes = _collector_changes(options)
    spool_bytes: list[int] = []

    def on_sample(elapsed_s: float) -> None:
        spool_bytes.append(_folder_bytes(spool))
        while changes and elapsed_s >= changes[0][0]:
            collector.tell(changes.pop(0)[1])

    with running_exporter(ring, folder / "state", port, options.spool_bytes) as exporter:
        produced_s = producer.run(options.seconds, on_sample)
        spool_bytes.append(_folder_bytes(spool))
        for _, command in changes:
            collector.tell(command)
        _, caught_up_s = _wait_for(collector, producer.num_operations)
        num_dropped = sink.num_dropped
        sink.close()
        exporter.terminate()
        exit_code = exporter.wait()
        # Of all children, only the exporter has been waited for so far.
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    report = collector.ask("report")
    collector.close()
    count = producer.num_operations
    return {
        "seconds": round(produced_s, 2),
        "operations_per_s": round(count / produced_s),
        "num_operations": count,
        "num_lost": count - report["num_operations"],
        "num_doubled": report["num_doubled"],
        "num_dropped_by_ring": num_dropped,
        "num_drop_spans": report["num_drop_spans"],
        "collector_away_s": options.collector_away,
        "caught_up_after_s": round(caught_up_s, 2),
        "spool_bytes_peak": max(spool_bytes),
        "spool_bytes_left": _folder_bytes(spool),
        "num_requests": report["num_requests"],
        "request_bytes_max": report["request_bytes_max"],
        "bytes_per_operation": round(report["num_bytes"] / max(1, report["num_operations"])),
        "producer_cpu_us_per_operation": round(producer.cpu_s / count * 1e6, 2),
        "exporter_cpu_us_per_operation": round((usage.ru_utime + usage.ru_stime) / count * 1e6, 2),
        "collector_cpu_us_per_operation": round(report["cpu_s"] / count * 1e6, 2),
        "exporter_rss_bytes_max": usage.ru_maxrss * 1024,
        "exporter_exit_code": exit_code,
        "is_ring_gone": not ring.exists(),
    }


def is_lossless(result: dict[str, Any]) -> bool:
    """Whether every operation came, and came once, and everything was put away."""
    return (
        not any(
            result[name]
            for name in (
                "num_lost",
                "num_doubled",
                "num_dropped_by_ring",
                "num_drop_spans",
                "spool_bytes_left",
                "exporter_exit_code",
            )
        )
        and result["is_ring_gone"]
        and result["request_bytes_max"] < REQUEST_BYTES_MAX
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to produce")
    parser.add_argument("--rate", type=int, default=50_000, help="operations a second")
    parser.add_argument("--collector-away", type=float, default=0.0, help="seconds, in the middle")
    parser.add_argument("--mode", choices=("all", "audit"), default="all")
    parser.add_argument("--spool-bytes", type=int, default=SPOOL_BYTES_DEFAULT)
    parser.add_argument("--output", type=Path, help="also write the result to this file")
    parser.add_argument("--role", choices=("producer", "collector"), default="producer")
    options = parser.parse_args(arguments)
    if options.role == "collector":
        run_collector()
        return 0
    with tempfile.TemporaryDirectory(prefix="pageframe-trace-") as folder:
        result = measure(options, Path(folder))
    text = json.dumps(result, indent=2)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")
    return 0 if is_lossless(result) else 1


if __name__ == "__main__":
    sys.exit(main())
