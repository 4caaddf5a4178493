"""What is no request gets an answer in the one form of errors, or its connection is closed."""

import asyncio
import json

import pytest

from pageframe.core.limits import LIMITS
from pageframe.gateway.http import body as body_module
from pageframe.gateway.http import server as server_module
from pageframe.rpc.auth import Caller
from unit.gateway.http_house import Says, eventually, http_house
from unit.gateway.replicas import make_facts

CHAT = "/v1/chat/completions"


def with_house(folder, scenario, *script, **options):
    async def run():
        facts = make_facts(model_folder=str(folder))
        async with asyncio.timeout(60), http_house(folder, facts, *script, **options) as house:
            return await scenario(house)

    return asyncio.run(run())


def error_of(answer):
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/json" in head
    return json.loads(body)["error"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b'["messages"]',
        b"\xff\xfe",
        b'{"n": NaN}',
        b'{"user": "\\ud800"}',
        b"[" * 100_000,
        b'{"seed": ' + b"9" * 5000 + b"}",
    ],
)
def test_a_body_that_is_no_json_object_is_400(model_folder, body):
    async def scenario(house):
        return await house.post(CHAT, body)

    code, answer = with_house(model_folder, scenario)
    assert (code, error_of(answer)["reason"]) == (400, "MALFORMED_JSON")
    assert b"x-request-id" in answer


@pytest.mark.parametrize("value", ["1e400", "9" * 400, "true", '"1"', "[]"])
def test_a_number_that_is_none_is_400(model_folder, value):
    async def scenario(house):
        body = f'{{"prompt": "a", "temperature": {value}, "logit_bias": {{"1": {value}}}}}'
        return await house.post("/v1/completions", body.encode())

    code, answer = with_house(model_folder, scenario)
    assert code == 400
    assert error_of(answer)["reason"] in ("FIELD_MALFORMED", "SAMPLING_PARAMETER_OUT_OF_RANGE")


@pytest.mark.parametrize("tells_length", [False, True])
def test_a_body_that_is_too_large_is_413(model_folder, tells_length):
    async def scenario(house):
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        if tells_length:
            body = b" " * (LIMITS.request_bytes_max + 1)
            head += f"connection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        else:
            body = 9 * (b"100000\r\n" + b" " * 0x100000 + b"\r\n") + b"0\r\n\r\n"
            head += "connection: close\r\ntransfer-encoding: chunked\r\n\r\n"
        return await house.raw(head.encode() + body)

    answer = with_house(model_folder, scenario)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert error_of(answer)["limits"]["num_bytes_max"] == str(LIMITS.request_bytes_max)


def test_a_refused_body_that_never_ends_ends_its_connection(model_folder, monkeypatch):
    monkeypatch.setattr(body_module, "_DISCARD_TIMEOUT_S", 0.05)

    async def scenario(house):
        return await house.raw(
            f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            f"content-length: {LIMITS.request_bytes_max + 1}\r\n\r\n".encode()
        )

    answer = with_house(model_folder, scenario)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer


def test_only_json_is_taken(model_folder):
    """A page in a browser may send plain text without asking, but not JSON."""

    async def scenario(house):
        return await house.raw(
            f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: text/plain\r\n"
            "connection: close\r\ncontent-length: 2\r\n\r\n{}".encode()
        )

    answer = with_house(model_folder, scenario)
    assert answer.startswith(b"HTTP/1.1 415 ")
    assert error_of(answer)["reason"] == "CONTENT_TYPE_UNKNOWN"


@pytest.mark.parametrize(
    ("line", "code", "reason"),
    [
        ("GET /v1/embeddings HTTP/1.1", 404, "UNKNOWN_URL"),
        ("POST /v1/chat/completions/ HTTP/1.1", 404, "UNKNOWN_URL"),
        (f"GET {CHAT} HTTP/1.1", 405, "METHOD_NOT_ALLOWED"),
        ("DELETE /v1/models HTTP/1.1", 405, "METHOD_NOT_ALLOWED"),
        ("GET /v1/models/other HTTP/1.1", 404, "UNKNOWN_MODEL"),
        ("GET /v1/models/ HTTP/1.1", 404, "UNKNOWN_MODEL"),
        ("NONSENSE", 400, "MALFORMED_HTTP"),
    ],
)
def test_what_is_not_there_is_told_in_the_same_form(model_folder, line, code, reason):
    async def scenario(house):
        return await house.raw(f"{line}\r\nhost: x\r\nconnection: close\r\n\r\n".encode())

    answer = with_house(model_folder, scenario)
    assert answer.startswith(f"HTTP/1.1 {code} ".encode())
    assert error_of(answer)["reason"] == reason


def test_a_header_without_end_is_refused(model_folder):
    async def scenario(house):
        line = b"GET /health HTTP/1.1\r\nx: "
        return await house.raw(line + b"a" * (LIMITS.http_header_bytes_max + 1))

    answer = with_house(model_folder, scenario)
    assert error_of(answer)["reason"] == "MALFORMED_HTTP"


@pytest.mark.parametrize("sent", [b"", b"GET /health HT"])
def test_a_connection_that_sends_no_header_is_closed(model_folder, monkeypatch, sent):
    monkeypatch.setattr(server_module, "HEADER_TIMEOUT_S", 0.05)

    async def scenario(house):
        try:
            return await house.raw(sent)
        except ConnectionResetError:
            return b""

    assert with_house(model_folder, scenario) == b""


def test_a_body_that_does_not_come_is_408(model_folder, monkeypatch):
    read = body_module.read_object

    monkeypatch.setattr(body_module, "_DISCARD_TIMEOUT_S", 0.05)

    async def impatient(headers, receive):
        return await read(headers, receive, timeout_s=0.05)

    monkeypatch.setattr("pageframe.gateway.http.exchange.read_object", impatient)

    async def scenario(house):
        return await house.raw(
            f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            "connection: close\r\ncontent-length: 20\r\n\r\n{".encode()
        )

    answer = with_house(model_folder, scenario)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert error_of(answer)["reason"] == "BODY_TIMEOUT"


def test_a_caller_that_does_not_read_is_cut_off(model_folder, monkeypatch):
    monkeypatch.setattr(server_module, "WRITE_TIMEOUT_S", 0.05)

    async def scenario(house):
        _, writer = await asyncio.open_connection("127.0.0.1", house.port, limit=1)
        body = json.dumps({"prompt": "a", "stream": True, "max_tokens": 200}).encode()
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            + f"content-length: {len(body)}\r\n\r\n".encode()
            + body
        )
        await eventually(lambda: house.link.mailboxes)
        ids = house.link.codec.encode("the fox runs. ")
        # More than all buffers between here and there hold.
        house.link.mailboxes[0].put_tokens(0, ids * 400_000)
        await eventually(lambda: house.link.cancels)
        writer.close()
        return house.link.cancels

    assert with_house(model_folder, scenario) == [(1, None)]


def test_two_requests_share_a_connection(model_folder):
    async def scenario(house):
        one = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
        last = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
        return await house.raw(one + last)

    assert with_house(model_folder, scenario).count(b"HTTP/1.1 200 OK") == 2


def test_a_name_that_cannot_be_repeated_is_replaced(model_folder):
    async def scenario(house):
        body = b'{"prompt": "a"}'
        return (await house.post("/v1/completions", body, "x-request-id: a b"))[1]

    answer = with_house(model_folder, scenario, Says("x"))
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert b"a b" not in answer


def test_two_living_requests_cannot_have_one_name(model_folder):
    async def scenario(house):
        body = b'{"prompt": "a"}'
        first = asyncio.ensure_future(house.post("/v1/completions", body, "x-request-id: r"))
        await eventually(lambda: house.link.submissions)
        code, answer = await house.post("/v1/completions", body, "x-request-id: r")
        house.link.end(1)
        return code, error_of(answer)["reason"], (await first)[0]

    assert with_house(model_folder, scenario) == (409, "REQUEST_EXISTS", 200)


def test_a_request_that_its_tenant_cancels_elsewhere_is_499(model_folder):
    async def scenario(house):
        body = b'{"prompt": "a"}'
        first = asyncio.ensure_future(house.post("/v1/completions", body, "x-request-id: r"))
        await eventually(lambda: house.link.submissions)
        house.service.cancel("default", "r")
        return (await first)[0]

    assert with_house(model_folder, scenario) == 499


def test_health_says_whether_requests_are_taken(model_folder):
    async def scenario(house):
        request = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
        before = await house.raw(request)
        await house.service.drain()
        code, refused = await house.post("/v1/completions", b'{"prompt": "a"}')
        return before, await house.raw(request), code, error_of(refused)["reason"]

    before, after, code, reason = with_house(model_folder, scenario)
    assert before.startswith(b"HTTP/1.1 200 ")
    assert after.startswith(b"HTTP/1.1 503 ")
    assert (code, reason) == (503, "DRAINING")


def test_metrics_are_for_operators(model_folder):
    async def scenario(house):
        codes = []
        for key in ("none", "plain", "op"):
            request = f"GET /metrics HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n"
            answer = await house.raw(f"{request}connection: close\r\n\r\n".encode())
            codes.append((int(answer.split()[1]), answer.endswith(b"m 1\n")))
        return codes

    keys = {"plain": Caller("a"), "op": Caller("b", is_operator=True)}
    codes = with_house(model_folder, scenario, keys=keys, metrics=lambda: b"m 1\n")
    assert codes == [(401, False), (403, False), (200, True)]


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_that_takes_too_long_is_told_that_the_process_ends(
    model_folder, monkeypatch, stream
):
    monkeypatch.setattr(server_module, "STOP_GRACE_S", 0)

    async def scenario(house):
        body = json.dumps({"prompt": "a", "stream": stream}).encode()
        asking = asyncio.ensure_future(house.post("/v1/completions", body))
        await eventually(lambda: house.link.mailboxes)
        house.link.mailboxes[0].put_tokens(0, [40])
        await house.server.stop()
        _, answer = await asking
        return answer, house.link.cancels

    answer, cancels = with_house(model_folder, scenario)
    assert b'"reason":"DRAINING"' in answer
    assert b"[DONE]" not in answer
    assert cancels == [(1, None)]


def test_the_door_closes_when_its_replies_are_out(model_folder):
    async def scenario(house):
        body = b'{"prompt": "a", "stream": true}'
        asking = asyncio.ensure_future(house.post("/v1/completions", body))
        await eventually(lambda: house.link.submissions)
        draining = asyncio.ensure_future(house.service.drain())
        house.link.mailboxes[0].put_tokens(0, [40])
        house.link.end(1)
        await draining
        await house.server.stop()
        code, answer = await asking
        with pytest.raises(ConnectionError):
            await house.raw(b"GET /health HTTP/1.1\r\n\r\n")
        return code, answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")

    assert with_house(model_folder, scenario) == (200, True)
