"""What one traced KV operation costs, and one span of a request: recording it, and encoding it.

    python -m bench.trace_costs [--output FILE]

CPU time of one thread, the least of many rounds: what the code takes when nothing disturbs it. The
result is one JSON object on standard output, in microseconds an operation, or a span: of the five
that a request has at least, in equal numbers.
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
from opentelemetry.sdk.trace import ReadableSpan

from pageframe.core.trace import AttributeValue, KvCause, KvOperation, TraceMode
from pageframe.telemetry import spans as names
from pageframe.telemetry.json_form import JsonForm
from pageframe.telemetry.kv_encoder import KvEncoder
from pageframe.telemetry.mapping import SpanMapper
from pageframe.telemetry.protobuf_form import ProtobufForm
from pageframe.telemetry.record_batch import Producer, RecordBatch
from pageframe.telemetry.records import unpack
from pageframe.telemetry.ring import RingReader, RingWriter
from pageframe.telemetry.ring_path import ring_path
from pageframe.telemetry.sink import RingTraceSink
from pageframe.telemetry.span_encoder import SpanEncoder
from pageframe.telemetry.span_form import SpanForm

_NUM_OPERATIONS = 2_000
_NUM_ROUNDS = 30
_PRODUCER = Producer("pageframe-executor", 1, 1)
_ATTRIBUTES: dict[str, dict[str, AttributeValue]] = {
    names.GENERATE: {
        names.REQUEST_ID: "0f8fad5b-d9cb-469f-a165-70867728950e",
        names.TENANT: "acme",
        names.PRIORITY: 0,
        names.GEN_AI_REQUEST_MODEL: "smollm2-135m-instruct",
        names.GEN_AI_REQUEST_MAX_TOKENS: 256,
        names.GEN_AI_REQUEST_TEMPERATURE: 0.7,
        names.GEN_AI_REQUEST_SEED: "1234567890123456789",
        names.GEN_AI_USAGE_INPUT_TOKENS: 32,
        names.GEN_AI_USAGE_OUTPUT_TOKENS: 256,
        names.GEN_AI_RESPONSE_FINISH_REASONS: ["length"],
        names.ELAPSED_MS: 500.25,
        names.COMPUTE_MS: 490.125,
    },
    names.SEQUENCE: {
        names.REQUEST_ID: "0f8fad5b-d9cb-469f-a165-70867728950e",
        names.TENANT: "acme",
        names.SAMPLE_INDEX: 0,
        names.FINISH_REASON: "length",
        names.GEN_AI_USAGE_INPUT_TOKENS: 32,
        names.GEN_AI_USAGE_OUTPUT_TOKENS: 256,
        names.NUM_CACHED_TOKENS: 0,
        names.NUM_PREEMPTIONS: 0,
        names.NUM_BLOCKS_PEAK: 18,
    },
    names.STALL: {names.STALL_CAUSE: "queue", names.TENANT: "acme"},
    names.PREFILL: {
        names.TOKENS_BEGIN: 0,
        names.TOKENS_END: 32,
        names.STEP_NUMBER: 12_345,
        names.GENERATION: 0,
        names.TENANT: "acme",
    },
    names.DECODE: {
        names.TOKENS_BEGIN: 32,
        names.TOKENS_END: 128,
        names.GENERATION: 0,
        names.DECODE_GAPS_MS: 1.375,
        names.TENANT: "acme",
    },
}


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


def record_spans(sink: RingTraceSink) -> None:
    """Spans as scheduler and gateway write them, with the keys that they have."""
    num_kinds = len(_ATTRIBUTES)
    for index in range(_NUM_OPERATIONS // num_kinds):
        # A trace of its own for each request: none grows so long that it is continued.
        trace_id = (1 + index).to_bytes(16, "big")
        for span_id, (name, attributes) in enumerate(_ATTRIBUTES.items(), start=index * num_kinds):
            # A value of its own for each span, as they have in life.
            attributes[names.SEQUENCE_ID] = index
            sink.span(
                name,
                trace_id=trace_id,
                span_id=1 + span_id,
                parent_span_id=7,
                start_ns=1_763_700_000_000_000_000 + index,
                end_ns=1_763_700_000_500_000_000 + index,
                attributes=attributes,
                links=((trace_id, 9),) if name == names.PREFILL else (),
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

    def spans() -> list[ReadableSpan]:
        return [span for item in packed for span in mapper.spans(unpack(item))]

    result["encode_protobuf_with_official_classes_us"] = least_us(
        lambda: encode_protobuf(spans()).SerializeToString()
    )
    result["encode_json_with_official_classes_us"] = least_us(
        lambda: json.dumps(encode_json(spans()).to_dict())
    )
    result |= measure_spans(sink, drain)
    reader.close()
    ring.close()
    return result


def measure_spans(sink: RingTraceSink, drain: Callable[[], bytes]) -> dict[str, float]:
    """The same of finished spans."""
    result = {"record_span_us": least_us(lambda: record_spans(sink), drain)}
    drain()
    record_spans(sink)
    batch = RecordBatch(_PRODUCER, 1, _NUM_OPERATIONS, (), drain())
    records = [batch.records[start:end] for start, end, _ in batch.each_record()]
    assert len(records) == _NUM_OPERATIONS, f"{len(records)} spans, the rest has moved or was lost"
    resource, mapper = SpanMapper(_PRODUCER).resource, SpanMapper(_PRODUCER)

    def encoding_spans(form: SpanForm) -> Callable[[], object]:
        encoder = SpanEncoder(form)
        return lambda: form.request(
            resource, [encoder.encode(batch.records, start) for start, _, _ in batch.each_record()]
        )

    def spans() -> list[ReadableSpan]:
        return [span for item in records for span in mapper.spans(unpack(item))]

    result["encode_span_protobuf_us"] = least_us(encoding_spans(ProtobufForm()))
    result["encode_span_json_us"] = least_us(encoding_spans(JsonForm()))
    result["encode_span_protobuf_with_official_classes_us"] = least_us(
        lambda: encode_protobuf(spans()).SerializeToString()
    )
    result["encode_span_json_with_official_classes_us"] = least_us(
        lambda: json.dumps(encode_json(spans()).to_dict())
    )
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
