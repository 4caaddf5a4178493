"""Ten thousand blocks and a thousand changes a second: nothing is lost, and how smooth it was.

Smoothness is measured and told, in `bench/results/pool_page.json` when `POOL_PAGE_RESULTS` is
set (`make pictures`); it decides nothing. What each block is in the end does.
"""

import asyncio
import json
import os
import random
import threading
import time
from pathlib import Path

import pytest
from starlette.applications import Starlette

from browser.test_pool_page import wait_for, wait_live
from integration.system import eventually
from pageframe.core.clock import SystemClock
from pageframe.core.trace import KvOperation
from pageframe.gateway.http.pool_page import PoolPage
from pageframe.gateway.http.server import HttpServer
from pageframe.rpc.addresses import ReplicaAddresses
from pageframe.rpc.auth import Authenticator
from pageframe.telemetry.metrics import POOL_VIEWER_RESETS
from pageframe.wire.memory_facts import StepFacts
from unit.gateway.http.played_memory import PlayedClients, PlayedMemory

NUM_BLOCKS = 10_000
NUM_CHANGES_PER_SECOND = 1_000
NUM_TICKS, TICK_S = 400, 0.02
NUM_SEQUENCES = 60
NEXT = {0: KvOperation.ALLOCATE, 1: KvOperation.RELEASE, 3: KvOperation.FREE}

RECORD = """() => {
  const told = globalThis.smoothness = {intervals: [], draws: [], tasks: []};
  const draw = pageframe.grid.draw.bind(pageframe.grid);
  pageframe.grid.draw = (now) => {
    const start = performance.now();
    draw(now);
    told.draws.push(performance.now() - start);
  };
  let before = performance.now();
  const picture = (now) => {
    told.intervals.push(now - before);
    before = now;
    requestAnimationFrame(picture);
  };
  requestAnimationFrame(picture);
  new PerformanceObserver((list) => {
    for (const entry of list.getEntries()) told.tasks.push(entry.duration);
  }).observe({type: "longtask"});
  told.drawnBefore = pageframe.grid.numDrawn;
}"""


class Stage:
    """The page's server over a played memory, on an event loop of its own."""

    def __init__(self):
        self.memory = PlayedMemory(NUM_BLOCKS)
        self.address = ""
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._over = asyncio.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._main()))

    def __enter__(self):
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()
        self._loop.close()

    def readings(self):
        return list(self._page.readings())

    def run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _main(self):
        page = self._page = PoolPage(
            ReplicaAddresses(["127.0.0.1:1"]),
            Authenticator({}),
            SystemClock(),
            tuple,
            open_clients=lambda _: PlayedClients(self.memory, []),
        )
        server = HttpServer(Starlette(routes=page.routes()), "127.0.0.1:0")
        await server.start()
        self.address = server.address
        self._ready.set()
        await self._over.wait()
        await page.stop()
        await server.stop()

    async def change(self, source):
        """A thousand changes a second, as steps would make them."""
        memory = self.memory
        start_s, num_each = time.monotonic(), round(NUM_CHANGES_PER_SECOND * TICK_S)
        for tick in range(NUM_TICKS):
            operations = []
            for block_id in source.sample(range(NUM_BLOCKS), num_each):
                operation = NEXT[int(memory.states[block_id])]
                holder = int(memory.holder[block_id]) or source.randint(1, NUM_SEQUENCES)
                operations.append((operation, holder, block_id))
            facts = StepFacts(tick + 1, time.time_ns(), 20_000_000, 60, 60, 100)
            memory.do_all(operations, (facts,))
            await asyncio.sleep(max(0.0, start_s + (tick + 1) * TICK_S - time.monotonic()))
        return NUM_TICKS * num_each / (time.monotonic() - start_s)


def summary(values):
    ordered = sorted(values)
    at = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    picked = {name: ordered[int(share * (len(ordered) - 1))] for name, share in at.items()}
    return {name: round(value, 2) for name, value in (picked | {"max": ordered[-1]}).items()}


@pytest.fixture
def stage():
    with Stage() as running:
        yield running


# The stage comes first, so that it ends last: a page that is still open would ask it, and complain.
def test_ten_thousand_blocks_are_followed_change_by_change(stage, new_page, record_property):
    print("seed 11")
    page = new_page(reduced_motion="no-preference")
    page.goto(f"http://{stage.address}/pool")
    wait_live(page)
    num_whole = page.evaluate("pageframe.pool.numWhole")
    page.evaluate(RECORD)
    changing = stage.run(stage.change(random.Random(11)))
    # The browser has its turns meanwhile: it is asked, too.
    eventually(lambda: page.evaluate("true") and changing.done(), "all changes were made")
    rate = changing.result()
    last = stage.memory.number
    wait_for(page, "(number) => pageframe.pool.operation === number", last)
    told = page.evaluate("smoothness")
    kinds = page.evaluate("Array.from(pageframe.pool.columns.kind)")
    holders = page.evaluate("Array.from(pageframe.pool.columns.holder)")
    names = {0: "free", 1: "held", 3: "fenced"}
    assert [page_kind(it) for it in kinds] == [names[int(it)] for it in stage.memory.states]
    assert holders == [int(it) or -1 for it in stage.memory.holder]
    # A browser that was too slow for changes alone is told everything, and that is counted.
    num_resets = next(it.value for it in stage.readings() if it.metric is POOL_VIEWER_RESETS)
    assert page.evaluate("pageframe.pool.numWhole") == num_whole + num_resets
    # Only cells that changed were drawn: each for as long as it flashes, never all.
    drawn = page.evaluate("pageframe.grid.numDrawn - smoothness.drawnBefore")
    assert drawn < len(told["draws"]) * NUM_BLOCKS / 4
    result = {
        "num_blocks": NUM_BLOCKS,
        "num_changes_per_second": round(rate),
        "num_frames": len(told["intervals"]),
        "frame_interval_ms": summary(told["intervals"]),
        "draw_ms": summary(told["draws"]),
        "num_long_tasks": len(told["tasks"]),
        "long_task_ms_max": round(max(told["tasks"], default=0.0), 1),
        "cells_drawn_per_frame": round(drawn / len(told["draws"])),
    }
    print(json.dumps(result))
    record_property("smoothness", json.dumps(result))
    if folder := os.environ.get("POOL_PAGE_RESULTS"):
        result["machine"] = f"{os.cpu_count()} cores, Chromium without GPU"
        (Path(folder) / "pool_page.json").write_text(json.dumps(result, indent=2) + "\n")


def page_kind(number):
    return ("free", "cached", "held", "shared", "pinned", "fenced", "quarantined")[number]
