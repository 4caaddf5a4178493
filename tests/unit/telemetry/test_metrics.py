"""Metrics: kept as plain numbers, told as Prometheus text."""

import asyncio
import contextlib
import random
import re
import socket

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pageframe.core.errors import PreconditionError
from pageframe.telemetry import metrics
from pageframe.telemetry.metrics import (
    METRICS,
    OTHER_NAMES,
    BoundedNames,
    Histogram,
    MetricKind,
    Reading,
)
from pageframe.telemetry.metrics_door import MetricsDoor
from pageframe.telemetry.metrics_text import MetricsText

TIMEOUT_S = 20


def families_of(text):
    return {family.name: family for family in text_string_to_metric_families(text.decode())}


def test_names_carry_units_and_are_spelt_once():
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names)) > 20
    for metric in METRICS:
        assert re.fullmatch(r"pageframe_[a-z_]+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind is MetricKind.COUNTER)
        assert metric.kind is not MetricKind.HISTOGRAM or metric.name.endswith("_seconds")
        assert metric.help.endswith(".")
        assert metric.services


def test_a_histogram_counts_what_is_at_most_a_bound():
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    histogram = Histogram((1.0, 2.0, 5.0))
    values = [rng.choice([0.5, 1.0, 1.5, 2.0, 4.0, 5.0, 9.0]) for _ in range(200)]
    for value in values:
        histogram.observe(value, 2)
    expected = [2 * sum(value <= bound for value in values) for bound in (1.0, 2.0, 5.0)]
    assert [sum(histogram.counts[: i + 1]) for i in range(3)] == expected
    assert sum(histogram.counts) == 2 * len(values)
    assert histogram.total == 2 * sum(values)


def test_names_from_outside_are_bounded():
    names = BoundedNames(2)
    assert [names.of(it) for it in ("a", "b", "c", "a")] == ["a", "b", OTHER_NAMES, "a"]


def test_readings_become_prometheus_text():
    histogram = Histogram((0.5, 1.0))
    histogram.observe(0.7, 3)
    histogram.observe(9.0)
    readings = [
        Reading(metrics.TTFT, histogram),
        Reading(metrics.BLOCKS, 7, ("free",)),
        Reading(metrics.BLOCKS, 2, ("held",)),
        Reading(metrics.PROMPT_TOKENS, 11, ('a "tenant"\n',)),
    ]
    families = families_of(MetricsText(lambda: readings).render())
    ttft = families["pageframe_ttft_seconds"]
    buckets = {
        sample.labels["le"]: sample.value for sample in ttft.samples if "le" in sample.labels
    }
    assert buckets == {"0.5": 0, "1.0": 3, "+Inf": 4}
    assert [s.value for s in ttft.samples if s.name.endswith("_sum")] == [3 * 0.7 + 9.0]
    blocks = families["pageframe_blocks"]
    assert blocks.type == "gauge"
    assert {s.labels["state"]: s.value for s in blocks.samples} == {"free": 7, "held": 2}
    (tokens,) = families["pageframe_prompt_tokens"].samples
    assert (tokens.labels["tenant"], tokens.value) == ('a "tenant"\n', 11)
    assert "process_resident_memory_bytes" in families


def test_values_are_those_of_the_moment_of_asking():
    counts = [1]
    text = MetricsText(lambda: [Reading(metrics.LIVING_REQUESTS, counts[0])])
    assert b"pageframe_living_requests 1.0" in text.render()
    counts[0] = 2
    assert b"pageframe_living_requests 2.0" in text.render()


def ask(data, render=lambda: b"page\n"):
    async def run():
        door = MetricsDoor(0, render)
        server = await asyncio.start_server(door._serve, "127.0.0.1", 0, limit=16 * 1024)
        port = server.sockets[0].getsockname()[1]
        async with asyncio.timeout(TIMEOUT_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(data)
            writer.write_eof()
            answer = await reader.read()
            writer.close()
            server.close()
        return answer

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("request_line", "status", "has_page"),
    [
        (b"GET /metrics HTTP/1.1", b"200", True),
        (b"GET /metrics?name[]=a HTTP/1.0", b"200", True),
        (b"HEAD /metrics HTTP/1.1", b"200", False),
        (b"GET / HTTP/1.1", b"404", False),
        (b"POST /metrics HTTP/1.1", b"405", False),
        (b"\xff\xfe", b"404", False),
    ],
)
def test_the_door_has_one_page(request_line, status, has_page):
    answer = ask(request_line + b"\r\nhost: x\r\n\r\n")
    assert answer.split()[1] == status
    assert answer.endswith(b"\r\n\r\npage\n") == has_page


@pytest.mark.parametrize("data", [b"", b"GET /metrics", b"x" * 100_000])
def test_what_is_no_request_is_closed_without_an_answer(data):
    # A reset is the same, with more of its bytes unread.
    with contextlib.suppress(ConnectionResetError):
        assert ask(data) == b""


def test_a_taken_port_is_named():
    async def run():
        server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(PreconditionError) as caught:
            await MetricsDoor(port, bytes).start()
        server.close()
        return caught.value, port

    error, port = asyncio.run(run())
    assert error.reason == "ADDRESS_IN_USE"
    assert str(port) in error.message


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_it_listens_where_it_is_told(host):
    async def run():
        with socket.socket() as probe:
            probe.bind((host, 0))
            port = probe.getsockname()[1]
        door = MetricsDoor(port, bytes, host=host)
        await door.start()
        (listening,) = door._server.sockets
        name = listening.getsockname()
        await door.stop()
        return name, port

    name, port = asyncio.run(run())
    assert name == (host, port)


def test_port_0_listens_nowhere():
    async def run():
        door = MetricsDoor(0, bytes)
        await door.start()
        await door.stop()
        return door._server

    assert asyncio.run(run()) is None
