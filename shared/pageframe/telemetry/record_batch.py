"""A batch of records on their way from a ring to wherever spans go.

Records stay packed as long as they can: copying them out of a ring takes a hundredth of the time
that encoding their spans takes, and they need a third of the space. So a ring is emptied at once
however busy the machine is, and encoding may take its time.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Final, NamedTuple

from pageframe.telemetry.ring import RECORD_HEADER, RecordKind

_END_OF_HEADER: Final = b"\n"
_PAD: Final = int(RecordKind.PAD)
_RECORD_BYTES_MIN: Final = RECORD_HEADER.size


class Loss(NamedTuple):
    """How many records or spans were lost since the last time this was said, in all, and where."""

    lost_by: str
    num_lost: int
    num_lost_total: int


@dataclass(frozen=True, slots=True)
class Producer:
    """Who recorded: what spans say of their process.

    Attributes:
        service_name: For example ``pageframe-executor``.
        incarnation: Names this run of the process; in ``[1, 2**63)``.
        pid: Process id.
    """

    service_name: str
    incarnation: int
    pid: int


@dataclass(frozen=True, slots=True)
class RecordBatch:
    """Packed records of one producer, one after the other, and what was lost before them.

    Attributes:
        producer: Whose they are.
        time_ns: When they were taken from the ring, nanoseconds since the Unix epoch.
        num_records: How many, padding left out.
        losses: What was lost before them.
        records: As they lay in the ring.
    """

    producer: Producer
    time_ns: int
    num_records: int
    losses: tuple[Loss, ...]
    records: bytes

    def pack(self) -> bytes:
        """A line of JSON, then the records."""
        header = {
            "producer": asdict(self.producer),
            "time_ns": self.time_ns,
            "num_records": self.num_records,
            "losses": self.losses,
        }
        return json.dumps(header).encode() + _END_OF_HEADER + self.records

    @classmethod
    def unpack(cls, packed: bytes) -> "RecordBatch":
        """Inverse of ``pack``.

        Raises:
            ValueError: if the header is damaged.
        """
        written, _, records = packed.partition(_END_OF_HEADER)
        try:
            header = json.loads(written)
            return cls(
                producer=Producer(**header["producer"]),
                time_ns=header["time_ns"],
                num_records=header["num_records"],
                losses=tuple(Loss(*loss) for loss in header["losses"]),
                records=records,
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"the header of a batch is damaged: {error}") from error

    def each_record(self) -> Iterator[tuple[int, int, int]]:
        """Where each record begins and ends in ``records``, and its kind, without padding.

        Raises:
            ValueError: at the first record that is damaged or cut off.
        """
        records, at, end = self.records, 0, len(self.records)
        header_of = RECORD_HEADER.unpack_from
        while at < end:
            if at + _RECORD_BYTES_MIN > end:
                raise ValueError(f"{end - at} bytes at {at} are less than a record")
            length, kind = header_of(records, at)
            if length < _RECORD_BYTES_MIN or at + length > end:
                raise ValueError(f"a record of {length} bytes at {at} in a batch of {end} bytes")
            if kind != _PAD:
                yield at, at + length, kind
            at += length
