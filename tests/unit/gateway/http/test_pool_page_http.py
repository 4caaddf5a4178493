"""The pool page over HTTP: files, who may look, who is told what, and how views end."""

import asyncio
import contextlib
import json
import re
from pathlib import Path

import pytest
from starlette.applications import Starlette

from pageframe.core.clock import ManualClock
from pageframe.core.trace import KvOperation
from pageframe.gateway.http import pool_page
from pageframe.gateway.http.pool_page import FILES, PoolPage
from pageframe.gateway.http.server import HttpServer
from pageframe.rpc.addresses import ReplicaAddresses
from pageframe.rpc.auth import Authenticator, Caller
from pageframe.telemetry import metrics
from pageframe.telemetry.metrics import Reading
from pageframe.wire.memory_facts import Retention, RetentionKind
from unit.gateway.http.played_memory import PlayedClients, PlayedMemory, Screen

PATIENCE_S = 20
KEYS = {
    "k-red": Caller("red"),
    "k-blue": Caller("blue"),
    "k-op": Caller("ops", is_operator=True),
}


class House:
    def __init__(self, keys):
        self.memory = PlayedMemory()
        self.other = PlayedMemory(4)
        self.credentials = []
        self.addresses = ["unix:/run/executor.sock"]
        readings = [
            Reading(metrics.COMPUTE_SECONDS, 2.0),
            Reading(metrics.STALL_SECONDS, 0.5, ("queue",)),
            Reading(metrics.STALL_SECONDS, 0.0, ("quota",)),
        ]

        def open_clients(address):
            memory = self.memory if address == "unix:/run/executor.sock" else self.other
            return PlayedClients(memory, self.credentials)

        self.clock = ManualClock(3_000_000_000)
        directory = ReplicaAddresses([])
        directory.find = self.find
        self.page = PoolPage(
            directory,
            Authenticator(keys),
            self.clock,
            lambda: readings,
            open_clients=open_clients,
        )
        self.server = HttpServer(Starlette(routes=self.page.routes()), "127.0.0.1:0")

    async def find(self):
        return self.addresses

    async def open(self, path, key="", *headers):
        """Send a request; its reader and writer."""
        port = int(self.server.address.rpartition(":")[2])
        # A frame may be longer than a reader's usual limit for a line.
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
        lines = [f"GET {path} HTTP/1.1", "host: x", "connection: close", *headers]
        if key:
            lines.append(f"authorization: Bearer {key}")
        writer.write("\r\n".join([*lines, "", ""]).encode())
        return reader, writer

    async def get(self, path, key="", *headers):
        """The code, the headers and the body of an answer that ends."""
        reader, writer = await self.open(path, key, *headers)
        try:
            answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
        finally:
            writer.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        first, *rest = head.decode().split("\r\n")
        return int(first.split()[1]), dict(it.split(": ", 1) for it in rest), body

    @contextlib.asynccontextmanager
    async def viewer(self, key="", query=""):
        """A screen that takes each frame as it comes."""
        reader, writer = await self.open(f"/pool/events{query}", key)
        screen = Screen()

        async def look():
            while line := await reader.readline():
                if line.startswith(b"data: {"):
                    screen.take(line[6:])

        task = asyncio.create_task(look())
        try:
            yield screen
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            writer.close()


def run(scenario, keys=None):
    async def main():
        house = House(keys or {})
        await house.server.start()
        try:
            async with asyncio.timeout(60):
                await scenario(house)
        finally:
            await house.page.stop()
            await house.server.stop()

    asyncio.run(main())


async def until(condition):
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - whoever sets it knows nothing of an event
            await asyncio.sleep(0.001)


def error_of(body):
    return json.loads(body)["error"]["reason"]


def test_the_page_may_ask_nobody_but_its_gateway():
    async def scenario(house):
        code, headers, body = await house.get("/pool")
        assert (code, headers["content-type"]) == (200, "text/html; charset=utf-8")
        policy = dict(
            it.strip().split(" ", 1) for it in headers["content-security-policy"].split(";")
        )
        assert policy["default-src"] == "'none'"
        assert set(policy.values()) == {"'none'", "'self'"}
        assert headers["x-content-type-options"] == "nosniff"
        for name in re.findall(rb'(?:src|href)="([^"]+)"', body):
            code, headers, _ = await house.get(f"/{name.decode()}")
            assert (code, name) == (200, name)
            assert "content-security-policy" in headers

    run(scenario, KEYS)


def test_files_name_nothing_outside():
    for path in FILES.iterdir():
        if not path.name.startswith("uPlot"):
            found = re.findall(r"(?:https?:)?//[a-z][\w.-]+\.[a-z]{2,}", path.read_text())
            assert [it for it in found if "www.w3.org" not in it] == [], path


@pytest.mark.parametrize(
    "path",
    ["/pool/nothing.js", "/pool/..%2f__init__.py", "/pool/%2e%2e", "/pool/pool_page.py"],
)
def test_only_files_of_the_page_are_given(path):
    async def scenario(house):
        code, _, _ = await house.get(path)
        assert code == 404

    run(scenario)


def test_a_file_that_has_not_changed_is_not_sent_again():
    async def scenario(house):
        _, headers, body = await house.get("/pool/main.js")
        assert body == (Path(FILES) / "main.js").read_bytes()
        code, _, body = await house.get("/pool/main.js", "", f"if-none-match: {headers['etag']}")
        assert (code, body) == (304, b"")
        code, _, body = await house.get("/pool/grid.js", "", f"if-none-match: {headers['etag']}")
        assert code == 200

    run(scenario)


@pytest.mark.parametrize("path", ["/pool/events", "/pool/blocks/1", "/pool/replicas"])
def test_the_pool_is_for_those_with_a_key(path):
    async def scenario(house):
        for key, reason in (("", "CREDENTIALS_MISSING"), ("wrong", "CREDENTIALS_UNKNOWN")):
            code, _, body = await house.get(path, key)
            assert (code, error_of(body)) == (401, reason)
        assert house.credentials == []

    run(scenario, KEYS)


def test_each_caller_looks_with_its_own_credentials():
    async def scenario(house):
        async with (
            house.viewer("k-red") as red,
            house.viewer("k-blue") as blue,
            house.viewer("k-red") as second,
        ):
            await until(lambda: red.columns and blue.columns and second.columns)
            assert sorted(house.credentials) == ["Bearer k-blue", "Bearer k-red"]
            assert house.memory.num_watching == 2
        await until(lambda: not house.memory.num_watching)
        assert house.page.num_viewers == 0
        async with house.viewer("k-red") as red:
            await until(lambda: red.columns)
        assert len(house.credentials) == 3

    run(scenario, KEYS)


def test_names_of_others_are_not_shown_whatever_the_executor_says():
    """It should have taken them out; a gateway with other keys than its executor would tell."""

    async def scenario(house):
        house.memory.tenants = {3: "red", 4: "blue"}
        house.memory.do(KvOperation.ALLOCATE, 3, 0)
        house.memory.do(KvOperation.ALLOCATE, 4, 1)
        async with house.viewer("k-red") as screen:
            await until(lambda: screen.columns)
            assert screen.columns["holder"].tolist()[:3] == [3, 0, -1]
            assert set(screen.names) == {3}
            await until(lambda: screen.version > 2)
            assert screen.samples == []
        house.memory.retentions = [
            Retention(
                name=f"kept-{tenant}",
                kind=RetentionKind.HANDLE,
                tenant=tenant,
                num_blocks_pinned=1,
                expire_ns=9,
            )
            for tenant in ("red", "blue")
        ]
        _, _, body = await house.get("/pool/blocks/1", "k-red")
        told = json.loads(body)
        assert (told["tenant"], [it["name"] for it in told["retentions"]]) == ("", ["kept-red"])
        _, _, body = await house.get("/pool/blocks/1", "k-op")
        told = json.loads(body)
        assert (told["tenant"], len(told["retentions"])) == ("blue", 2)

    run(scenario, KEYS)


def test_an_operator_sees_where_time_went():
    async def scenario(house):
        async with house.viewer() as screen:
            await until(lambda: screen.samples)
            assert screen.samples[0] == [3000, 2000.0, {"queue": 500.0}]

    run(scenario)


def test_a_block_is_explained():
    async def scenario(house):
        house.memory.do(KvOperation.ALLOCATE, 3, 2)
        code, _, body = await house.get("/pool/blocks/2")
        told = json.loads(body)
        assert code == 200
        assert (told["state"], told["cause"], told["operation"]) == (
            "held",
            "decode",
            "kv.allocate",
        )
        assert (told["tenant"], told["sequence_ids"], told["time_ns"]) == ("red", [3], 2 * 10**9)

    run(scenario)


@pytest.mark.parametrize(
    ("block_id", "code", "reason"),
    [
        ("99", 404, "BLOCK_UNKNOWN"),
        ("9999999999", 404, "BLOCK_UNKNOWN"),
        ("99999999999", 400, "FIELD_MALFORMED"),
        ("-1", 400, "FIELD_MALFORMED"),
        ("x", 400, "FIELD_MALFORMED"),
    ],
)
def test_what_is_no_block_is_refused(block_id, code, reason):
    async def scenario(house):
        answer = await house.get(f"/pool/blocks/{block_id}")
        assert (answer[0], error_of(answer[2])) == (code, reason)

    run(scenario)


def test_viewers_and_callers_are_bounded(monkeypatch):
    monkeypatch.setattr(pool_page, "NUM_VIEWERS_MAX", 2)
    monkeypatch.setattr(pool_page, "NUM_FEEDS_MAX", 1)

    async def scenario(house):
        async with house.viewer("k-red") as one:
            await until(lambda: one.columns)
            code, _, body = await house.get("/pool/events", "k-blue")
            assert (code, error_of(body)) == (429, "VIEWERS_FULL")
            async with house.viewer("k-red") as two:
                await until(lambda: two.columns)
                code, _, body = await house.get("/pool/events", "k-red")
                assert (code, error_of(body)) == (429, "VIEWERS_FULL")
        await until(lambda: not house.page.num_viewers)
        async with house.viewer("k-blue") as blue:
            await until(lambda: blue.columns)

    run(scenario, KEYS)


BOTH = ["unix:/run/executor.sock", "10.0.0.2:50053"]


def test_any_replica_can_be_looked_at(monkeypatch):
    monkeypatch.setattr(pool_page, "NUM_FEEDS_MAX", 1)

    async def scenario(house):
        house.addresses = BOTH
        house.other.do(KvOperation.ALLOCATE, 7, 3)
        for query, num_blocks in (
            ("", 8),
            ("?replica=executor", 8),
            ("?replica=10.0.0.2%3A50053", 4),
        ):
            async with house.viewer(query=query) as screen:
                await until(lambda screen=screen: screen.columns)
                assert len(screen.columns["kind"]) == num_blocks
        async with house.viewer() as one, house.viewer(query=f"?replica={BOTH[1]}") as other:
            await until(lambda: one.columns and other.columns)
            assert (house.memory.num_watching, house.other.num_watching) == (1, 1)
            _, _, body = await house.get(f"/pool/blocks/3?replica={BOTH[1]}")
            assert json.loads(body)["sequence_ids"] == [7]
        assert (house.memory.asked, house.other.asked) == ([], [3])

    run(scenario)


@pytest.mark.parametrize("path", ["/pool/events", "/pool/blocks/1"])
def test_a_replica_that_is_not_there_is_said_and_taken_when_it_is(path):
    async def scenario(house):
        asked = f"{path}?replica={BOTH[1]}"
        code, _, body = await house.get(asked)
        assert (code, error_of(body)) == (404, "REPLICA_UNKNOWN")
        assert "there are executor" in json.loads(body)["error"]["message"]
        house.addresses = BOTH
        house.clock.advance_ns(5 * 10**9)
        reader, writer = await house.open(asked)
        assert b" 200 " in await asyncio.wait_for(reader.readline(), PATIENCE_S)
        writer.close()

    run(scenario)


def test_while_no_name_was_resolved_there_is_nobody_to_ask():
    async def scenario(house):
        house.addresses = []
        code, _, body = await house.get("/pool/events")
        assert (code, error_of(body)) == (503, "REPLICAS_UNKNOWN")

    run(scenario)


def test_the_pools_of_all_replicas_are_counted():
    async def scenario(house):
        house.addresses = BOTH
        house.memory.do(KvOperation.ALLOCATE, 3, 0, 1)
        house.other.is_away = True
        code, _, body = await house.get("/pool/replicas", "k-red")
        assert code == 200
        told = json.loads(body)
        first, second = told["replicas"]
        assert (first["replica"], first["away"]) == ("executor", "")
        assert (first["pool"]["total"], first["pool"]["free"], first["pool"]["held"]) == (8, 6, 2)
        away = {"replica": BOTH[1], "pool": None, "away": "nobody answers at the executor"}
        assert second == away
        house.other.is_away = False
        _, _, body = await house.get("/pool/replicas", "k-red")
        total = json.loads(body)["total"]
        assert (total["total"], total["free"], total["held"]) == (12, 10, 2)

    run(scenario, KEYS)


def test_a_browser_that_goes_away_is_noticed():
    async def scenario(house):
        reader, writer = await house.open("/pool/events")
        await asyncio.wait_for(reader.readuntil(b"data: "), PATIENCE_S)
        assert house.page.num_viewers == 1
        writer.close()
        await until(lambda: not house.page.num_viewers and not house.memory.num_watching)

    run(scenario)


def test_views_end_well_when_the_gateway_does():
    async def scenario(house):
        reader, writer = await house.open("/pool/events")
        await asyncio.wait_for(reader.readuntil(b"data: "), PATIENCE_S)
        house.page.close()
        rest = await asyncio.wait_for(reader.read(), PATIENCE_S)
        assert b"data: [DONE]" in rest
        writer.close()

    run(scenario)


def test_viewers_are_counted_and_so_are_those_that_were_too_slow():
    def values(house):
        return {it.metric: it.value for it in house.page.readings()}

    async def scenario(house):
        async with house.viewer() as screen:
            await until(lambda: screen.columns)
            assert values(house) == {metrics.POOL_VIEWERS: 1, metrics.POOL_VIEWER_RESETS: 0}
            (feed,) = house.page._feeds.values()
            feed._frames.num_resets = 3
            assert values(house)[metrics.POOL_VIEWER_RESETS] == 3
        await until(lambda: not house.page._feeds)
        assert values(house) == {metrics.POOL_VIEWERS: 0, metrics.POOL_VIEWER_RESETS: 3}

    run(scenario)
