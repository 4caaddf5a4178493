"""Errors cross the wire whole: class, reason, message and numbers."""

import asyncio

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from pageframe.core import errors
from pageframe.core.errors import PageframeError
from pageframe.rpc.handlers import aborting
from pageframe.rpc.status import ERROR_CLASSES, from_rpc_error, to_rich_status

DETAILS = "grpc-status-details-bin"

CLASSES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, PageframeError) and value is not PageframeError
]


def test_every_error_class_has_its_own_canonical_code():
    assert set(CLASSES) == set(ERROR_CLASSES.values())
    assert {error.status for error in CLASSES} <= {code.name for code in grpc.StatusCode}


class _Raising(grpc.GenericRpcHandler):
    """Answers any method by raising what the test wants."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def service(self, handler_call_details):
        async def handle(request, context):
            async with aborting(context):
                raise self._error

        return grpc.unary_unary_rpc_method_handler(handle)


async def _call(error: Exception) -> PageframeError:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((_Raising(error),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(grpc.RpcError) as caught:
                await channel.unary_unary("/x.Y/Z")(b"", timeout=10)
            return from_rpc_error(caught.value)
    finally:
        await server.stop(None)


@pytest.mark.parametrize("error_class", CLASSES)
def test_an_error_arrives_as_it_was_raised(error_class):
    arrived = asyncio.run(_call(error_class("SOME_REASON", "say it plainly", num_tokens=7)))
    assert type(arrived) is error_class
    assert (arrived.reason, arrived.message) == ("SOME_REASON", "say it plainly")
    assert arrived.limits == {"num_tokens": "7"}


def test_a_bug_reaches_the_caller_without_its_words():
    arrived = asyncio.run(_call(ValueError("the password is swordfish")))
    assert type(arrived) is errors.InternalError
    assert arrived.reason == "INTERNAL"
    assert "swordfish" not in arrived.message


def test_the_code_is_the_canonical_one():
    status = to_rich_status(errors.OutOfRangeError("A", "b"))
    assert status.code is grpc.StatusCode.OUT_OF_RANGE


def test_who_may_come_again_is_told_when_in_the_form_of_every_client():
    error = errors.ResourceExhaustedError("RATE_LIMITED", "too often", retry_after_s="1.2505")
    status = status_pb2.Status.FromString(dict(to_rich_status(error).trailing_metadata)[DETAILS])
    retry = error_details_pb2.RetryInfo()
    assert [detail.Unpack(retry) for detail in status.details] == [False, True]
    assert retry.retry_delay.ToMilliseconds() == 1251
    arrived = asyncio.run(_call(error))
    assert (arrived.reason, arrived.limits) == ("RATE_LIMITED", {"retry_after_s": "1.2505"})


def test_a_peer_that_is_not_there_is_unavailable():
    async def call() -> PageframeError:
        async with grpc.aio.insecure_channel("unix:/nowhere/at/all.sock") as channel:
            with pytest.raises(grpc.RpcError) as caught:
                await channel.unary_unary("/x.Y/Z")(b"", timeout=10)
            return from_rpc_error(caught.value)

    arrived = asyncio.run(call())
    assert type(arrived) is errors.UnavailableError
    assert arrived.reason == "TRANSPORT"


class _Gone:
    """A call whose caller went away a moment ago."""

    async def abort_with_status(self, _status):
        raise grpc.aio.InternalError("execute_batch")


def test_an_error_for_a_caller_that_has_just_gone_is_no_failure_of_ours():
    async def handle():
        async with aborting(_Gone()):
            raise errors.DeadlineError("DEADLINE_UNREACHABLE", "1.4 ms are left")

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(handle())
