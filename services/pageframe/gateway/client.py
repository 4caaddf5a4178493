"""The gateway's stream to its scheduler: all requests of this process on one stream.

    submit ──▶ living ──▶ outbox ──▶ Connect ──▶ scheduler
    mailbox ◀── living ◀──────────── events ◀──┘

A lost stream is a stall, not an error: the living requests are submitted again on the next one,
with the tokens they have. Only when no stream comes up for ``lost_after_s`` do they fail.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import grpc
import structlog

from pageframe.core.errors import (
    CancelledError,
    DeadlineError,
    PageframeError,
    PreconditionError,
    UnavailableError,
)
from pageframe.core.request import Completion, Submission, TokenEvents
from pageframe.core.step import FinishReason, ReplicaFacts, TokenLogprobs
from pageframe.gateway.mailbox import Mailbox
from pageframe.rpc.channel import open_inner_channel
from pageframe.rpc.status import from_rpc_error, make_error
from pageframe.v1 import scheduler_service_pb2 as pb
from pageframe.v1 import scheduler_service_pb2_grpc
from pageframe.wire.replica import replica_from_proto
from pageframe.wire.request import events_from_proto, submission_to_proto

_log = structlog.get_logger(__name__)

_RECONNECT_DELAY_S = 0.05
_RECONNECT_DELAY_MAX_S = 1.0
_HANDLE_MAX = 2**32 - 1

_ConnectCall = grpc.aio.StreamStreamCall[pb.ConnectRequest, pb.ConnectResponse]


@dataclass(slots=True)
class _Living:
    """A request that has not ended.

    ``token_ids[sample]`` is its output so far; ``open_samples`` have not ended; of those,
    ``ending_samples`` were taken back by us and only wait for their account.
    """

    submission: Submission
    mailbox: Mailbox
    token_ids: list[list[int]]
    open_samples: set[int]
    ending_samples: set[int] = field(default_factory=set)

    def resubmission(self) -> Submission:
        """The request as it stands, with the output so far."""
        if not any(self.token_ids):
            return self.submission
        return replace(self.submission, resume_token_ids=[list(ids) for ids in self.token_ids])


class SchedulerLink:
    """Requests out, token events in. For one event loop; ``run`` keeps it connected.

    Args:
        address: Where the scheduler listens, ``HOST:PORT`` or ``unix:/path``.
        gateway_id: Name of this gateway process, unlike that of any other one.
        lost_after_s: How long living requests wait for a scheduler that went away.
    """

    def __init__(self, address: str, *, gateway_id: str, lost_after_s: float = 30.0) -> None:
        self._address = address
        self._gateway_id = gateway_id
        self._lost_after_s = lost_after_s
        self._facts: ReplicaFacts | None = None
        self._ready = asyncio.Event()
        self._handles = itertools.cycle(range(1, _HANDLE_MAX + 1))
        self._living: dict[int, _Living] = {}
        self._outbox: deque[pb.ConnectRequest] = deque()
        self._outbox_filled = asyncio.Event()
        self._is_connected = False
        self._is_lost = False
        self._give_up_timer: asyncio.TimerHandle | None = None

    @property
    def facts(self) -> ReplicaFacts:
        """What the replica serves.

        Raises:
            UnavailableError: reason NOT_READY, before the first hello.
        """
        if self._facts is None:
            raise UnavailableError("NOT_READY", "the scheduler has not answered yet; try again")
        return self._facts

    @property
    def num_living(self) -> int:
        """Requests that have not ended."""
        return len(self._living)

    async def wait_ready(self) -> None:
        """Wait for the first hello."""
        await self._ready.wait()

    def submit(self, submission: Submission, mailbox: Mailbox) -> int:
        """Send a request; its tokens go into ``mailbox``. Sets and returns its handle.

        Raises:
            UnavailableError: reason SCHEDULER_LOST, when it has been away for too long.
        """
        if self._is_lost:
            raise self._lost_error()
        handle = next(handle for handle in self._handles if handle not in self._living)
        submission.handle = handle
        living = _Living(
            submission,
            mailbox,
            [list(ids) for ids in submission.resume_token_ids]
            or [[] for _ in range(submission.num_samples)],
            set(range(submission.num_samples)),
        )
        self._living[handle] = living
        if self._is_connected:
            self._send(pb.ConnectRequest(submit=submission_to_proto(submission)))
        return handle

    def cancel(self, handle: int, sample_index: int | None = None) -> None:
        """Take back a request, at once and for ever; or one sample, whose completion still comes.

        Nothing happens for a request that has ended.
        """
        living = self._living.get(handle)
        if living is None:
            return
        if sample_index is None:
            del self._living[handle]
        else:
            living.ending_samples.add(sample_index)
        if self._is_connected:
            self._send_cancel(handle, sample_index)
        elif sample_index is not None:
            self._settle_ending(living)

    async def run(self) -> None:
        """Stay connected until cancelled."""
        delay_s = _RECONNECT_DELAY_S
        self._start_give_up_timer()
        while True:
            try:
                async with open_inner_channel(self._address) as channel:
                    call = await self._open(channel)
                    delay_s = _RECONNECT_DELAY_S
                    await self._use(call)
            except PageframeError as error:
                _log.warning("scheduler_lost", reason=error.reason, message=error.message)
            finally:
                self._disconnected()
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, _RECONNECT_DELAY_MAX_S)

    async def _open(self, channel: grpc.aio.Channel) -> _ConnectCall:
        call = scheduler_service_pb2_grpc.SchedulerServiceStub(channel).Connect(wait_for_ready=True)
        hello = pb.GatewayHello(gateway_id=self._gateway_id)
        try:
            await call.write(pb.ConnectRequest(hello=hello))
            response = await call.read()
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        if not isinstance(response, pb.ConnectResponse):
            raise await _stream_error(call)
        if not response.HasField("hello"):
            raise PreconditionError("HELLO_EXPECTED", "the scheduler did not begin with a hello")
        self._set_facts(response.hello)
        return call

    async def _use(self, call: _ConnectCall) -> None:
        """Carry requests and events until the stream is lost."""
        self._connected()
        tasks = [
            asyncio.create_task(self._write_all(call)),
            asyncio.create_task(self._read_all(call)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            call.cancel()

    async def _write_all(self, call: _ConnectCall) -> None:
        while True:
            await self._outbox_filled.wait()
            self._outbox_filled.clear()
            while self._outbox:
                try:
                    await call.write(self._outbox.popleft())
                except grpc.RpcError as error:
                    raise from_rpc_error(error) from error
                except asyncio.InvalidStateError as error:
                    # This is how grpc.aio reports a write on a call that has ended.
                    raise await _stream_error(call) from error

    async def _read_all(self, call: _ConnectCall) -> None:
        while True:
            try:
                response = await call.read()
            except grpc.RpcError as error:
                raise from_rpc_error(error) from error
            if not isinstance(response, pb.ConnectResponse):
                raise await _stream_error(call)
            if response.HasField("events"):
                self._on_events(events_from_proto(response.events))
            else:
                self._set_facts(response.hello)

    def _set_facts(self, hello: pb.ConnectHello) -> None:
        self._facts = replica_from_proto(hello.replica)
        self._ready.set()

    def _connected(self) -> None:
        """Submit all living requests, with the tokens they have."""
        if self._give_up_timer is not None:
            self._give_up_timer.cancel()
            self._give_up_timer = None
        self._is_connected, self._is_lost = True, False
        self._outbox.clear()
        for handle, living in self._living.items():
            self._send(pb.ConnectRequest(submit=submission_to_proto(living.resubmission())))
            for sample_index in set(range(living.submission.num_samples)) - living.open_samples:
                self._send_cancel(handle, sample_index)
        _log.info("scheduler_connected", num_requests=len(self._living))

    def _disconnected(self) -> None:
        if self._is_connected:
            self._is_connected = False
            self._start_give_up_timer()
        for living in list(self._living.values()):
            self._settle_ending(living)

    def _start_give_up_timer(self) -> None:
        loop = asyncio.get_running_loop()
        self._give_up_timer = loop.call_later(self._lost_after_s, self._give_up)

    def _give_up(self) -> None:
        self._is_lost = True
        living, self._living = self._living, {}
        for entry in living.values():
            entry.mailbox.fail(self._lost_error())

    def _lost_error(self) -> UnavailableError:
        return UnavailableError(
            "SCHEDULER_LOST",
            f"the scheduler has been away for {self._lost_after_s:g} s; try again",
            lost_after_s=self._lost_after_s,
        )

    def _settle_ending(self, living: _Living) -> None:
        """End samples that only waited for their account: nobody will send it any more."""
        for sample_index in sorted(living.ending_samples):
            self._end_sample(
                living,
                Completion(
                    handle=living.submission.handle,
                    sample_index=sample_index,
                    finish_reason=FinishReason.CANCELLED,
                    num_prompt_tokens=len(living.submission.prompt_token_ids),
                ),
            )

    def _send(self, request: pb.ConnectRequest) -> None:
        self._outbox.append(request)
        self._outbox_filled.set()

    def _send_cancel(self, handle: int, sample_index: int | None) -> None:
        cancel = pb.CancelSubmission(handle=handle, sample_index=sample_index)
        self._send(pb.ConnectRequest(cancel=cancel))

    def _on_events(self, events: TokenEvents) -> None:
        start = 0
        for handle, sample_index, num_tokens in zip(
            events.handles, events.sample_indices, events.num_tokens, strict=True
        ):
            end = start + num_tokens
            living = self._living.get(handle)
            if living is not None and sample_index in living.open_samples:
                self._take_tokens(living, sample_index, events, start, end)
            start = end
        for handle, logprobs in events.prompt_logprobs.items():
            living = self._living.get(handle)
            if living is not None:
                living.mailbox.put_prompt_logprobs(logprobs)
        for completion in events.completions:
            self._on_completion(completion)

    def _take_tokens(
        self, living: _Living, sample_index: int, events: TokenEvents, start: int, end: int
    ) -> None:
        token_ids = events.token_ids[start:end]
        living.token_ids[sample_index] += token_ids
        logprobs: Sequence[TokenLogprobs] = ()
        if events.logprobs:
            found = (events.logprobs.get(position) for position in range(start, end))
            logprobs = [entry for entry in found if entry is not None]
        living.mailbox.put_tokens(sample_index, token_ids, logprobs)

    def _on_completion(self, completion: Completion) -> None:
        living = self._living.get(completion.handle)
        if living is None or completion.sample_index not in living.open_samples:
            return
        is_ours = completion.sample_index in living.ending_samples
        error = None if is_ours else _error_of(completion)
        if error is None:
            self._end_sample(living, completion)
            return
        living.mailbox.fail(error)
        living.open_samples.discard(completion.sample_index)
        if living.open_samples:
            self.cancel(completion.handle)
        else:
            del self._living[completion.handle]

    def _end_sample(self, living: _Living, completion: Completion) -> None:
        living.open_samples.discard(completion.sample_index)
        living.ending_samples.discard(completion.sample_index)
        if not living.open_samples:
            self._living.pop(living.submission.handle, None)
        living.mailbox.put_completion(completion)


def _error_of(completion: Completion) -> PageframeError | None:
    """The error that a completion stands for; None when the sample ended well."""
    if completion.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
        return None
    if completion.error_status:
        return make_error(
            completion.error_status,
            completion.error_reason,
            completion.error_message,
            completion.error_limits,
        )
    if completion.finish_reason is FinishReason.DEADLINE:
        return DeadlineError("DEADLINE_PASSED", "the deadline passed while the request ran")
    if completion.finish_reason is FinishReason.CANCELLED:
        return CancelledError("CANCELLED", "the scheduler took the request back")
    return make_error(
        "INTERNAL",
        completion.error_reason or "SEQUENCE_FAILED",
        completion.error_message or "the request failed",
        completion.error_limits,
    )


async def _stream_error(call: _ConnectCall) -> PageframeError:
    error = grpc.aio.AioRpcError(
        await call.code(),
        await call.initial_metadata(),
        await call.trailing_metadata(),
        details=await call.details(),
    )
    if error.code() is grpc.StatusCode.OK:
        return UnavailableError("STREAM_ENDED", "the scheduler ended the stream")
    return from_rpc_error(error)
