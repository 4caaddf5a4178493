"""Who is let in over TLS, and that files which are replaced are served anew."""

import asyncio
import contextlib
import socket
import ssl
from dataclasses import replace

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from certificates import Authority
from pageframe.core.errors import InvalidRequestError, PageframeError
from pageframe.rpc.channel import INNER_OPTIONS, InnerChannels, open_aio_channel
from pageframe.rpc.health import ask_health
from pageframe.rpc.lifecycle import Service, running
from pageframe.rpc.status import from_rpc_error
from pageframe.rpc.tls import ClientTls, ServerTls
from pageframe.rpc.tls_probe import find_tls_fault
from pageframe.rpc.tls_serving import server_context

NAME = "pageframe.v1.SchedulerService"
PATIENCE_S = 30.0
SERVING = "SERVING"


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("theirs"), "stranger")


@contextlib.asynccontextmanager
async def _served(tls, address="127.0.0.1:0"):
    service = Service(
        name="test",
        address=address,
        service_names=(NAME,),
        register=lambda _server: None,
        tls=tls,
    )
    async with running(service) as (bound, _):
        yield bound


async def _ask(address, tls) -> str:
    """What it says of itself, or the reason of the error."""
    # Every channel connects anew: one that another test, or the line above, left open would tell
    # nothing of who is let in now.
    options = [*INNER_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
    async with open_aio_channel(address, options, tls) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        except grpc.RpcError as error:
            return from_rpc_error(error).reason
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


def _run(scenario):
    return asyncio.run(asyncio.wait_for(scenario(), PATIENCE_S))


def _server_tls(pair, client_ca=None) -> ServerTls:
    return ServerTls(cert=pair.cert, key=pair.key, client_ca=client_ca)


def _client_tls(authority, pair=None, **more) -> ClientTls:
    tls = ClientTls(ca=authority.pem, **more)
    return tls if pair is None else replace(tls, cert=pair.cert, key=pair.key)


def test_those_who_know_the_ca_are_answered_and_others_are_told_why(authority, stranger):
    known, unknown = _client_tls(authority), _client_tls(stranger)

    async def scenario():
        async with _served(_server_tls(authority.issue("server"))) as address:
            said = [await _ask(address, tls) for tls in (known, unknown, None, known)]
            fault = [
                await asyncio.to_thread(find_tls_fault, address, tls)
                for tls in (unknown, None, known)
            ]
            return said, fault

    said, (unknown_fault, plain_fault, no_fault) = _run(scenario)
    assert said == [SERVING, "TLS_PEER_NOT_TRUSTED", "TRANSPORT", SERVING]
    assert "certificate of the server" in unknown_fault
    assert "speaks TLS" in plain_fault
    assert no_fault == ""


def test_with_a_client_ca_only_certificates_of_it_are_let_in(authority, stranger):
    mine, theirs = authority.issue("caller"), stranger.issue("caller")
    good, bare = _client_tls(authority, mine), _client_tls(authority)
    foreign = _client_tls(authority, theirs)

    async def scenario():
        tls = _server_tls(authority.issue("server"), authority.pem)
        async with _served(tls) as address:
            said = [await _ask(address, it) for it in (bare, good, foreign, good)]
            fault = [
                await asyncio.to_thread(find_tls_fault, address, it)
                for it in (bare, foreign, good, None)
            ]
            return said, fault

    said, (bare_fault, foreign_fault, no_fault, plain_fault) = _run(scenario)
    assert said == ["TRANSPORT", SERVING, "TRANSPORT", SERVING]
    assert "asks callers for a certificate" in bare_fault
    assert "refuses the certificate" in foreign_fault
    assert no_fault == ""
    assert "speaks TLS" in plain_fault


def test_the_name_is_that_of_the_address_unless_given(authority):
    pair = authority.issue("named", extension="subjectAltName=DNS:inside.example")

    async def scenario():
        async with _served(_server_tls(pair)) as address:
            names = ("", "inside.example", "other.example")
            return [await _ask(address, _client_tls(authority, name=name)) for name in names]

    assert _run(scenario) == ["TLS_PEER_NOT_TRUSTED", SERVING, "TLS_PEER_NOT_TRUSTED"]


def test_a_certificate_itself_may_stand_for_its_ca(authority):
    pair = authority.issue("pinned")

    async def scenario():
        async with _served(_server_tls(pair)) as address:
            tls = ClientTls(ca=pair.cert)
            return await _ask(address, tls), await asyncio.to_thread(find_tls_fault, address, tls)

    assert _run(scenario) == (SERVING, "")


def test_replaced_files_are_served_to_those_who_come_next(authority, stranger):
    ours, theirs = _client_tls(authority), _client_tls(stranger)

    async def scenario():
        pair = authority.issue("replaced")
        async with (
            _served(_server_tls(pair)) as address,
            open_aio_channel(address, INNER_OPTIONS, ours) as channel,
        ):
            before = [await _ask(address, tls) for tls in (ours, theirs)]
            stub = health_pb2_grpc.HealthStub(channel)
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
            pair.replace_by(stranger.issue("newer"))
            after = [await _ask(address, tls) for tls in (ours, theirs)]
            # Whoever was there before goes on.
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
            return before, after

    before, after = _run(scenario)
    assert before == [SERVING, "TLS_PEER_NOT_TRUSTED"]
    assert after == ["TLS_PEER_NOT_TRUSTED", SERVING]


def test_bad_files_change_nothing_and_are_complained_of_once(authority):
    ours = _client_tls(authority)

    async def scenario():
        pair, newer = authority.issue("half_replaced"), authority.issue("other_half")
        async with _served(_server_tls(pair)) as address:
            with structlog.testing.capture_logs() as logs:
                pair.key.write_bytes(newer.key.read_bytes())
                said = [await _ask(address, ours) for _ in range(3)]
                pair.cert.write_bytes(newer.cert.read_bytes())
                said.append(await _ask(address, ours))
        return said, [entry for entry in logs if entry["event"].startswith("tls_")]

    said, logs = _run(scenario)
    assert said == [SERVING] * 4
    events = [(entry["event"], entry.get("reason")) for entry in logs]
    assert events == [("tls_files_refused", "TLS_KEY_MISMATCH"), ("tls_certificate_replaced", None)]


def test_a_replaced_client_ca_lets_in_others(authority, stranger, tmp_path):
    ca = tmp_path / "clients.pem"
    ca.write_bytes(authority.pem.read_bytes())
    mine = _client_tls(authority, authority.issue("caller"))
    theirs = _client_tls(authority, stranger.issue("caller"))

    async def scenario():
        async with _served(_server_tls(authority.issue("server"), ca)) as address:
            before = [await _ask(address, tls) for tls in (mine, theirs)]
            ca.write_bytes(stranger.pem.read_bytes())
            return before, [await _ask(address, tls) for tls in (mine, theirs)]

    assert _run(scenario) == ([SERVING, "TRANSPORT"], ["TRANSPORT", SERVING])


def test_a_server_does_not_start_on_bad_files(authority):
    async def scenario(tls):
        async with _served(tls):
            raise AssertionError("it serves")

    mine, other = authority.issue("mine"), authority.issue("other")
    with pytest.raises(InvalidRequestError, match="not that of the certificate"):
        asyncio.run(scenario(ServerTls(cert=mine.cert, key=other.key)))


def test_reflection_and_health_are_told_over_tls(authority):
    tls = _client_tls(authority)

    async def scenario():
        async with _served(_server_tls(authority.issue("server"))) as address:
            async with InnerChannels(tls=tls)(address) as channel:
                stub = reflection_pb2_grpc.ServerReflectionStub(channel)
                request = reflection_pb2.ServerReflectionRequest(list_services="")
                call = stub.ServerReflectionInfo(iter([request]), timeout=PATIENCE_S)
                listed = (await call.read()).list_services_response.service
            return {it.name for it in listed}, await asyncio.to_thread(ask_health, address, tls=tls)

    names, said = _run(scenario)
    assert NAME in names
    assert said == SERVING


def test_a_socket_stays_as_it_is(authority, stranger, tmp_path):
    async def scenario():
        tls = _server_tls(authority.issue("server"), authority.pem)
        async with _served(tls, f"unix:{tmp_path}/s.sock") as address:
            return [await _ask(address, it) for it in (None, _client_tls(stranger))]

    assert _run(scenario) == [SERVING, SERVING]


@pytest.mark.parametrize(
    ("address", "has_tls", "num_warnings"),
    [("0.0.0.0:0", False, 1), ("0.0.0.0:0", True, 0), ("127.0.0.1:0", False, 0)],
)
def test_plain_text_for_other_machines_is_said_once(authority, address, has_tls, num_warnings):
    async def scenario():
        tls = _server_tls(authority.issue("server")) if has_tls else None
        with structlog.testing.capture_logs() as logs:
            async with _served(tls, address) as bound:
                pass
        return bound, [entry for entry in logs if entry["event"] == "plain_text"]

    bound, logs = _run(scenario)
    assert [(it["log_level"], it["address"]) for it in logs] == [("warning", bound)] * num_warnings


def test_python_s_own_tls_follows_its_files_too(authority, stranger):
    async def come(port, trusted, pair):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(trusted.pem)
        context.load_cert_chain(pair.cert, pair.key)
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
            heard = await reader.read()
        except ssl.SSLCertVerificationError:
            return "not trusted"
        except ConnectionError:
            return "turned away"
        writer.close()
        return heard.decode() or "turned away"

    async def greet(_reader, writer):
        writer.write(b"hello")
        writer.close()

    async def scenario():
        pair, ca = authority.issue("door"), authority.issue("x").cert.with_name("clients.pem")
        ca.write_bytes(authority.pem.read_bytes())
        mine, theirs = authority.issue("caller"), stranger.issue("caller")
        server = await asyncio.start_server(
            greet, "127.0.0.1", 0, ssl=server_context(_server_tls(pair, ca))
        )
        async with server:
            port = server.sockets[0].getsockname()[1]
            callers = [(authority, mine), (authority, theirs), (stranger, theirs)]
            before = [await come(port, *caller) for caller in callers]
            pair.replace_by(stranger.issue("newer"))
            ca.write_bytes(stranger.pem.read_bytes())
            return before, [await come(port, *caller) for caller in callers]

    before, after = _run(scenario)
    assert before == ["hello", "turned away", "not trusted"]
    assert after == ["not trusted", "not trusted", "hello"]


def test_a_server_that_knows_no_tls_is_told_apart_from_nobody(authority):
    tls = _client_tls(authority)

    async def scenario():
        async with _served(None) as address:
            return await asyncio.to_thread(find_tls_fault, address, tls)

    assert "does not speak TLS" in _run(scenario)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert find_tls_fault(f"127.0.0.1:{port}", tls) == ""


def test_a_missing_ca_is_an_error_of_the_channel(tmp_path):
    with pytest.raises(PageframeError, match=r"nowhere\.pem"):
        InnerChannels(tls=ClientTls(ca=tmp_path / "nowhere.pem"))("127.0.0.1:1")
