"""The journal of a scheduler, between domain types and protobuf; ``journal.proto`` says what it is.

A journal is read back entry by entry, from its beginning to its end or to where it was cut off: a
process that is killed leaves half a record behind, and everything before it is good.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from google.protobuf import text_format
from google.protobuf.message import DecodeError

from pageframe.core.errors import InvalidRequestError, PreconditionError
from pageframe.core.journal import (
    Call,
    Cancelled,
    CancelsTaken,
    Drained,
    Entry,
    ExecutorLost,
    ExecutorReady,
    Expired,
    GatewayCancelled,
    Header,
    MemorySetup,
    Planned,
    ResultTaken,
    SampleFinished,
    Submitted,
    TermsSet,
)
from pageframe.core.plan import StepPlan
from pageframe.core.step import FinishReason, StepResult
from pageframe.core.terms import TenantRate, TenantTerms
from pageframe.v1 import executor_service_pb2, journal_pb2, sequence_pb2
from pageframe.wire.plan import plan_to_proto
from pageframe.wire.replica import (
    pool_from_proto,
    pool_to_proto,
    quota_from_proto,
    quota_to_proto,
    replica_from_proto,
    replica_to_proto,
)
from pageframe.wire.request import submission_from_proto, submission_to_proto
from pageframe.wire.step import (
    refusal_from_proto,
    refusal_to_proto,
    result_from_proto,
    result_to_proto,
)

FORMAT = 1
_RECORD_BYTES_MAX = 1 << 28
_VARINT_BYTES_MAX = 5


def plan_call(plan: StepPlan | None) -> "journal_pb2.JournalPlan":
    """What a journal says of a plan."""
    if plan is None:
        return journal_pb2.JournalPlan()
    outline = plan_to_proto(plan)
    digest = hashlib.sha256(outline.SerializeToString(deterministic=True)).digest()
    for announcement in outline.announce:
        announcement.ClearField("token_ids")
    return journal_pb2.JournalPlan(sha256=digest, outline=outline)


def planned(plan: StepPlan | None) -> Planned:
    """The same as a reader gets it."""
    return _planned(plan_call(plan))


def result_digest(result: StepResult) -> bytes:
    """SHA-256 of a result in its wire form, less the times, which are another machine's."""
    if result.refusal:
        message: Any = refusal_to_proto(result, 0)
    else:
        message = result_to_proto(result)
        message.ClearField("timing")
    return hashlib.sha256(message.SerializeToString(deterministic=True)).digest()


def result_text(result: StepResult) -> str:
    """A result for people, less the times."""
    message = result_to_proto(result)
    message.ClearField("timing")
    return f"refusal: {result.refusal}" if result.refusal else _text(message)


def encode_entry(now_ns: int, raised: str = "", **call: Any) -> bytes:
    """A record with its length before it; ``call`` names the one field that it is."""
    record = journal_pb2.JournalRecord(now_ns=now_ns, raised=raised, **call)
    payload = record.SerializeToString()
    return _varint(len(payload)) + payload


def encode_header(header: Header, now_ns: int) -> bytes:
    """The first record of a journal."""
    memory = header.memory
    message = journal_pb2.JournalHeader(
        format=FORMAT,
        software=header.software,
        replica=replica_to_proto(header.facts),
        options_json=header.options_json,
        is_traced=header.is_traced,
        settings_json=header.settings_json,
        memory=journal_pb2.JournalMemory(
            eviction_policy=memory.eviction_policy,
            session_ttl_ns=memory.session_ttl_ns,
            session_idle_ns=memory.session_idle_ns,
            num_blocks_max=memory.num_blocks_max,
        ),
    )
    return encode_entry(now_ns, header=message)


def call_to_proto(call: Call) -> dict[str, Any]:
    """The field of a record that says ``call``; not for headers and plans, see above.

    What the call was given is copied, so it may be changed before the record is encoded.
    """
    match call:
        case Submitted(submission, gateway_id):
            return {
                "submit": journal_pb2.JournalSubmit(
                    gateway_id=gateway_id, submission=submission_to_proto(submission)
                )
            }
        case Cancelled(gateway_id, handle, reason):
            return {
                "cancel": journal_pb2.JournalCancel(
                    gateway_id=gateway_id,
                    handle=handle,
                    reason=sequence_pb2.FinishReason.ValueType(reason),
                )
            }
        case GatewayCancelled(gateway_id):
            return {"cancel_gateway": journal_pb2.JournalCancelGateway(gateway_id=gateway_id)}
        case SampleFinished(gateway_id, handle, sample_index):
            return {
                "finish_sample": journal_pb2.JournalFinishSample(
                    gateway_id=gateway_id, handle=handle, sample_index=sample_index
                )
            }
        case CancelsTaken(sequence_ids):
            return {"take_cancels": journal_pb2.JournalTakeCancels(sequence_ids=sequence_ids)}
        case ResultTaken(result) if result.refusal:
            return {"refusal": refusal_to_proto(result, 0)}
        case ResultTaken(result):
            return {"result": result_to_proto(result)}
        case ExecutorReady(facts, account):
            return {
                "executor_ready": journal_pb2.JournalExecutorReady(
                    replica=replica_to_proto(facts), pool=pool_to_proto(account)
                )
            }
        case TermsSet(terms):
            return {"set_terms": _terms_to_proto(terms)}
        case Expired():
            return {"expire": journal_pb2.JournalExpire()}
        case ExecutorLost():
            return {"executor_lost": journal_pb2.JournalExecutorLost()}
        case Drained():
            return {"drain": journal_pb2.JournalDrain()}
        case _:
            raise AssertionError(f"{call} is not written by this function")


_READERS: dict[str, Callable[[Any], Call]] = {
    "header": lambda it: Header(
        facts=replica_from_proto(it.replica),
        options_json=it.options_json,
        is_traced=it.is_traced,
        settings_json=it.settings_json,
        software=it.software,
        memory=MemorySetup(
            eviction_policy=it.memory.eviction_policy,
            session_ttl_ns=it.memory.session_ttl_ns,
            session_idle_ns=it.memory.session_idle_ns,
            num_blocks_max=it.memory.num_blocks_max,
        ),
    ),
    "submit": lambda it: Submitted(submission_from_proto(it.submission), it.gateway_id),
    "cancel": lambda it: Cancelled(it.gateway_id, it.handle, FinishReason(it.reason)),
    "cancel_gateway": lambda it: GatewayCancelled(it.gateway_id),
    "finish_sample": lambda it: SampleFinished(it.gateway_id, it.handle, it.sample_index),
    "expire": lambda _: Expired(),
    "take_cancels": lambda it: CancelsTaken(list(it.sequence_ids)),
    "plan": lambda it: _planned(it),
    "result": lambda it: ResultTaken(result_from_proto(it)),
    "refusal": lambda it: ResultTaken(refusal_from_proto(it)),
    "executor_lost": lambda _: ExecutorLost(),
    "executor_ready": lambda it: ExecutorReady(
        replica_from_proto(it.replica), pool_from_proto(it.pool)
    ),
    "set_terms": lambda it: TermsSet(_terms_from_proto(it)),
    "drain": lambda _: Drained(),
}


class JournalReader:
    """Reads a journal from a binary file.

    Attributes:
        num_records: Whole records read so far.
        num_bytes_cut: Bytes of a record at the end that is not whole; 0 until all was read.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.num_records = 0
        self.num_bytes_cut = 0

    def __iter__(self) -> Iterator[Entry]:
        """Entries in order, up to the last whole one.

        Raises:
            PreconditionError: JOURNAL_MALFORMED, with the number of the record.
        """
        while (payload := self._next_payload()) is not None:
            self.num_records += 1
            yield self._decode(payload)

    def _next_payload(self) -> bytes | None:
        prefix = b""
        while byte := self._file.read(1):
            prefix += byte
            if byte[0] < 0x80:
                break
            if len(prefix) == _VARINT_BYTES_MAX:
                raise self._malformed("no length")
        else:
            self.num_bytes_cut = len(prefix)
            return None
        num_bytes = sum((part & 0x7F) << 7 * place for place, part in enumerate(prefix))
        if num_bytes > _RECORD_BYTES_MAX:
            raise self._malformed(f"a length of {num_bytes} bytes")
        payload = self._file.read(num_bytes)
        if len(payload) < num_bytes:
            self.num_bytes_cut = len(prefix) + len(payload)
            return None
        return payload

    def _decode(self, payload: bytes) -> Entry:
        try:
            record = journal_pb2.JournalRecord.FromString(payload)
            kind = record.WhichOneof("call")
            if kind is None:
                raise self._malformed("no call that this version knows")
            if kind == "header" and record.header.format != FORMAT:
                raise self._malformed(f"format {record.header.format}; this reads {FORMAT}")
            return Entry(record.now_ns, _READERS[kind](getattr(record, kind)), record.raised)
        except (DecodeError, ValueError, InvalidRequestError) as error:
            raise self._malformed(str(error)) from None

    def _malformed(self, what: str) -> PreconditionError:
        return PreconditionError(
            "JOURNAL_MALFORMED",
            f"record {self.num_records} of the journal cannot be read: {what}",
            record=self.num_records,
        )


def _terms_to_proto(terms: TenantTerms) -> "journal_pb2.JournalSetTerms":
    return journal_pb2.JournalSetTerms(
        weights=terms.weights,
        quotas=map(quota_to_proto, terms.quotas),
        rates=[
            journal_pb2.TenantRate(
                tenant=rate.tenant,
                num_requests_per_minute=rate.num_requests_per_minute,
                num_tokens_per_minute=rate.num_tokens_per_minute,
            )
            for rate in terms.rates
        ],
    )


def _terms_from_proto(message: "journal_pb2.JournalSetTerms") -> TenantTerms:
    return TenantTerms(
        weights=dict(message.weights),
        quotas=tuple(map(quota_from_proto, message.quotas)),
        rates=tuple(
            TenantRate(
                tenant=rate.tenant,
                num_requests_per_minute=rate.num_requests_per_minute,
                num_tokens_per_minute=rate.num_tokens_per_minute,
            )
            for rate in message.rates
        ),
    )


def _planned(message: "journal_pb2.JournalPlan") -> Planned:
    if not message.sha256:
        return Planned()
    return Planned(message.sha256, _text(message.outline))


def _text(message: "executor_service_pb2.StepPlan | executor_service_pb2.StepResult") -> str:
    text: str = text_format.MessageToString(message, use_short_repeated_primitives=True)
    return text


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
