"""What one traced KV operation costs: recording it, and encoding its span.

    python -m bench.trace_costs [--output FILE]

CPU time of one thread, the least of many rounds: what the code takes when nothing disturbs it. The
result is one JSON object on standard output, in microseconds an operation.
"""

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from opentelemetry.exporter.otlp.json.common.trace_encoder import encode_spans as encode_json
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans as encode_protobuf

from pageframe.core.trace import KvCause, KvOperation, TraceMode
from pageframe.telemetry.json_form import JsonForm
from pageframe.telemetry.kv_encoder import KvEncoder
from pageframe.telemetry.mapping import SpanMapper
from pageframe.telemetry.protobuf_form import ProtobufForm
from pageframe.telemetry.record_batch import Producer, RecordBatch
from pageframe.telemetry.records import unpack
from pageframe.telemetry.ring import RingReader, RingWriter
from pageframe.telemetry.ring_path import ring_path
from pageframe.telemetry.sink import RingTraceSink
from pageframe.telemetry.span_form import SpanForm

_NUM_OPERATIONS = 2_000
_NUM_ROUNDS = 60
_PRODUCER = Producer("pageframe-executor", 1, 1)


def least_us(run: Callable[[], object], reset: Callable[[], object] = lambda: None) -> float:
    """Microseconds an operation; ``run`` does ``_NUM_OPERATIONS`` of them."""
    best_ns = min(_round_ns(run, reset) for _ in range(_NUM_ROUNDS))
    return round(best_ns / _NUM_OPERATIONS / 1000, 2)


def _round_ns(run: Callable[[], object], reset: Callable[[], object]) -> int:
    reset()
    begin_ns = time.thread_time_ns()
    run()
    return time.thread_time_ns() - begin_ns


def record(sink: RingTraceSink, block_ids: Sequence[int]) -> None:
    operation, cause = KvOperation.ALLOCATE, KvCause.DECODE
    for position in range(_NUM_OPERATIONS):
        sink.kv(
            operation,
            cause,
            sequence_id=7,
            generation=0,
            position=position,
            step=5,
            block_ids=block_ids,
            num_free_after=900,
        )


def measure(path: Path) -> dict[str, float]:
    ring = RingWriter(path, service_name="bench", mode=TraceMode.ALL, incarnation=1)
    reader = RingReader(path)
    sink = RingTraceSink(ring, mode=TraceMode.ALL)
    sink.sequence_begin(
        7, trace_id=bytes(range(16)), span_id=bytes(range(8)), request_id="r", tenant="acme"
    )

    def drain() -> bytes:
        records = b""
        while reader.num_bytes_waiting:
            records += reader.read(1 << 30)[0]
        reader.commit()
        return records

    result = {}
    for num_blocks in (1, 4):
        run = functools.partial(record, sink, list(range(100, 100 + num_blocks)))
        result[f"record_{num_blocks}_block_us"] = least_us(run, drain)
    drain()
    record(sink, [100, 200])
    batch = RecordBatch(_PRODUCER, 1, _NUM_OPERATIONS, (), drain())
    assert sink.num_dropped == 0, "the ring is too small for one round"
    result["encode_protobuf_us"] = least_us(encoding(ProtobufForm(), batch))
    result["encode_json_us"] = least_us(encoding(JsonForm(), batch))
    mapper = SpanMapper(_PRODUCER)
    packed = [batch.records[start:end] for start, end, _ in batch.each_record()]

    def spans() -> list[object]:
        return [span for item in packed for span in mapper.spans(unpack(item))]

    result["encode_protobuf_with_official_classes_us"] = least_us(
        lambda: encode_protobuf(spans()).SerializeToString()
    )
    result["encode_json_with_official_classes_us"] = least_us(
        lambda: json.dumps(encode_json(spans()).to_dict())
    )
    reader.close()
    ring.close()
    return result


def encoding(form: SpanForm, batch: RecordBatch) -> Callable[[], object]:
    """What encodes the batch, from packed records to a request."""
    mapper = SpanMapper(_PRODUCER)
    encoder = KvEncoder(form, mapper)

    def run() -> bytes:
        entries = [encoder.encode(batch.records, start, []) for start, _, _ in batch.each_record()]
        return form.request(mapper.resource, entries)

    return run


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, help="also write the result to this file")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="pageframe-trace-") as folder:
        path = ring_path(Path(folder), 1, "executor")
        try:
            result = measure(path)
        finally:
            path.unlink(missing_ok=True)
    text = json.dumps(result, indent=2)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
