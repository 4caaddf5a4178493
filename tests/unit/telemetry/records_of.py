"""Records one by one, as tests want to see them."""

from pageframe.telemetry.record_batch import Producer, RecordBatch
from pageframe.telemetry.records import unpack
from pageframe.telemetry.ring import RingReader

ALL = 1 << 40
EXECUTOR = Producer("pageframe-executor", 1, 1)


def make_batch(*records: bytes, producer: Producer = EXECUTOR, losses=()) -> RecordBatch:
    return RecordBatch(producer, 1, len(records), tuple(losses), b"".join(records))


def split(records: bytes) -> list[bytes]:
    batch = make_batch(records)
    return [records[start:end] for start, end, _ in batch.each_record()]


def read_some(reader: RingReader, num_bytes_max: int = ALL) -> list[bytes]:
    """What one call gives."""
    records, num_records = reader.read(num_bytes_max)
    found = split(records)
    assert len(found) == num_records
    return found


def read_packed(reader: RingReader) -> list[bytes]:
    """All that waits: reading stops at the end of the memory, so it may take several calls."""
    found: list[bytes] = []
    while reader.num_bytes_waiting:
        found += read_some(reader)
    return found


def read_all(reader: RingReader):
    return [unpack(record) for record in read_packed(reader)]
