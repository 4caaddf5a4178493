"""The pool page in a real browser, before a real system: what a person sees is what there is."""

import contextlib
import os
import re
import threading
import urllib.request
from pathlib import Path

import pytest

from browser.lively import OPERATOR_KEY, Lively, write_keys
from integration.system import eventually
from pageframe.client import GenerationRequest, PageframeClient
from pageframe.core.errors import PageframeError

NUM_BLOCKS = 160
# Ends of its own accord long after the test has seen it; then it is taken back.
LONG = {"max_tokens": 1500, "ignore_eos": True, "temperature": 0.0}
PICTURE = "pool-page.png"


@pytest.fixture(scope="module")
def system(start_system, sim_folder):
    running = start_system(
        sim_folder, "--sim-step", "10ms", "--num-blocks", str(NUM_BLOCKS), "--block-size", "16"
    )
    yield running
    running.settle()
    running.stop()


@pytest.fixture(scope="module")
def guarded(start_system, sim_folder, tmp_path_factory):
    """One with keys, and a pool that all tenants fill."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    write_keys(keys)
    running = start_system(
        sim_folder,
        *("--sim-step", "25ms", "--num-blocks", "720", "--block-size", "16"),
        *("--max-num-sequences", "24", "--prefill-chunk-tokens", "256"),
        *("--session-idle", "3s", "--api-keys", str(keys)),
    )
    yield running
    running.stop()


def open_page(new_page, system, **options):
    page = new_page(**options)
    page.goto(f"http://{system.http_address}/pool")
    return page


def wait_for(page, expression, arg=None):
    """Wait until something is true in the page. Asked from here: its policy forbids `eval`."""
    eventually(lambda: page.evaluate(expression, arg), expression)


def wait_live(page):
    page.wait_for_selector("#state[data-state=live]")
    wait_for(page, "pageframe.pool.numBlocks > 0 && !pageframe.grid.isWhole")


@contextlib.contextmanager
def running_request(address, key=None, **fields):
    """A request that runs while the block does; its first token is there."""
    begun, over = threading.Event(), threading.Event()
    failures = []

    def run():
        try:
            with PageframeClient(address, api_key=key) as client:
                generation = client.generate(GenerationRequest(**fields))
                with contextlib.closing(generation):
                    for number, _ in enumerate(generation):
                        if number == 1:
                            begun.set()
                        if over.is_set():
                            return
        except PageframeError as error:
            failures.append(error)
            begun.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert begun.wait(60)
        assert failures == []
        yield
    finally:
        over.set()
        thread.join()


def blocks_of(page, kind):
    return page.evaluate(
        "(kind) => [...Array(pageframe.pool.numBlocks).keys()]"
        ".filter((id) => pageframe.pool.kind(id) === kind)",
        kind,
    )


def colour_of(page, block_id):
    """The colour that the screen really has in the middle of a cell, once it does not flash."""
    wait_for(page, "pageframe.grid.flashes.size === 0 && pageframe.grid.dirty.size === 0")
    return page.evaluate(
        """(id) => {
          const [x, y] = pageframe.grid.placeOf(id), half = pageframe.grid.size / 2;
          const at = pageframe.grid.context.getImageData(x + half, y + half, 1, 1).data;
          return "#" + [...at.slice(0, 3)].map((it) => it.toString(16).padStart(2, "0")).join("");
        }""",
        block_id,
    )


def point_at(page, block_id):
    x, y = page.evaluate(
        "(id) => pageframe.grid.placeOf(id).map((it) => it + pageframe.grid.size / 2)", block_id
    )
    page.hover("#cells", position={"x": x, "y": y})


def test_a_request_fills_blocks_and_gives_them_back(new_page, system):
    page = open_page(new_page, system)
    wait_live(page)
    assert page.evaluate("pageframe.pool.numBlocks") == NUM_BLOCKS
    assert colour_of(page, NUM_BLOCKS - 1) == "#e3e7ee"
    prompt = " ".join(f"sentence {number}" for number in range(20))
    with running_request(system.address, prompt=prompt, request_id="seen-<b>by</b>-many", **LONG):
        wait_for(page, "pageframe.pool.tally().sequences.size === 1")
        wait_for(page, "[...pageframe.pool.names.values()].length === 1")
        num_held = "pageframe.pool.tally().kinds[pageframe.pool.kinds.indexOf('held')]"
        wait_for(page, f"(least) => {num_held} >= least", len(prompt) // 16 // 4)
        held = blocks_of(page, "held")
        wait_for(page, f"(before) => {num_held} > before", len(held))
        point_at(page, held[0])
        wait_for(page, "document.getElementById('tip').innerText.includes('prefix index')")
        told = page.inner_text("#tip")
        assert told.startswith(f"block {held[0]}: held")
        assert "seen-<b>by</b>-many (sequence " in told
        for word in ("tenant\ndefault", "cause\n", "last operation\nkv.", "since\n", " s"):
            assert word in told, told
        assert page.evaluate("pageframe.grid.marked.size") >= len(held)
        wait_for(
            page,
            "document.getElementById('holder-rows').innerText.includes('seen-<b>by</b>-many')",
        )
    page.mouse.move(1, 1)
    page.wait_for_selector("#tip", state="hidden")
    wait_for(page, "pageframe.pool.tally().sequences.size === 0")
    left = blocks_of(page, "cached")
    assert set(held[:-1]) <= set(left), "its full blocks can be found again"
    assert colour_of(page, left[0]) == "#56b4e9"
    assert page.evaluate("pageframe.pool.away") == ""


def test_steps_and_waits_are_told(new_page, system):
    page = open_page(new_page, system)
    wait_live(page)
    with PageframeClient(system.address) as client:
        client.complete(GenerationRequest(prompt="count", max_tokens=90, ignore_eos=True))
    wait_for(page, "pageframe.pool.steps.length >= 60")
    steps = page.evaluate("pageframe.pool.steps")
    numbers = [step[0] for step in steps]
    assert numbers == list(range(numbers[0], numbers[-1] + 1))
    for _, start_ms, duration_ms, num_sequences, num_tokens, num_free in steps:
        assert start_ms > 1e12
        # Steps follow each other at once: where one ends and the next begins is read from a clock.
        assert duration_ms > 9.9, "a step of the simulated model takes ten milliseconds"
        assert (num_sequences, num_tokens >= 1) == (1, True)
        assert num_free <= NUM_BLOCKS
    wait_for(page, "document.querySelectorAll('#charts canvas').length === 3")
    wait_for(page, "document.getElementById('stall-rows').innerText.includes('computing')")


def test_it_can_be_read_with_the_keyboard_alone(new_page, system):
    page = open_page(new_page, system)
    wait_live(page)
    page.focus("#cells")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft"):
        page.keyboard.press(key)
    wanted = page.evaluate("pageframe.grid.numColumns")
    wait_for(page, "(id) => pageframe.grid.cursor === id", wanted)
    wait_for(
        page,
        "(id) => document.getElementById('told').textContent.startsWith(`block ${id}: `)",
        arg=wanted,
    )
    page.keyboard.press("Escape")
    page.wait_for_selector("#tip", state="hidden")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(new_page, system, scheme):
    phone = {"width": 360, "height": 740}
    page = open_page(new_page, system, viewport=phone, color_scheme=scheme)
    wait_live(page)
    # Panels come later than the cells, and charts once their room is known.
    wait_for(page, "document.querySelectorAll('#legend li').length === 7")
    wait_for(page, "document.querySelectorAll('#charts canvas').length === 3")
    wait_for(page, "document.documentElement.scrollWidth <= 360")
    box = page.locator("#cells").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360
    assert page.evaluate("pageframe.grid.size") >= 8


def test_a_page_that_nobody_sees_costs_nothing(new_page, system):
    page = open_page(new_page, system)
    wait_live(page)
    show = (
        "(hidden) => { Object.defineProperty(document, 'hidden',"
        " {value: hidden, configurable: true});"
        " document.dispatchEvent(new Event('visibilitychange')); }"
    )
    page.evaluate(show, True)
    assert page.evaluate("pageframe.feed.abort") is None
    version = page.evaluate("pageframe.pool.numWhole")
    page.evaluate(show, False)
    wait_for(page, "(before) => pageframe.pool.numWhole > before", arg=version)


def test_an_executor_that_dies_is_said_and_waited_for(new_page, system):
    page = open_page(new_page, system)
    wait_live(page)
    num_whole = page.evaluate("pageframe.pool.numWhole")
    system.kill_service("executor")
    page.wait_for_selector("#state[data-state=away]")
    assert page.evaluate("pageframe.pool.numBlocks") == NUM_BLOCKS, "what it was like stays"
    system.wait_restarted("executor")
    page.wait_for_selector("#state[data-state=live]")
    assert page.evaluate("pageframe.pool.numWhole") > num_whole


def test_a_key_is_asked_for_and_a_tenant_sees_its_own(new_page, guarded):
    page = open_page(new_page, guarded)
    page.wait_for_selector("#ask[open]")
    page.fill("#key", "not-a-key")
    page.press("#key", "Enter")
    wait_for(page, "document.getElementById('ask-why').textContent.includes('not known')")
    page.wait_for_selector("#ask[open]")
    page.fill("#key", "cedar-key")
    page.press("#key", "Enter")
    wait_live(page)
    both = [
        running_request(
            guarded.address, f"{tenant}-key", prompt="a", request_id=f"of-{tenant}", **LONG
        )
        for tenant in ("atlas", "cedar")
    ]
    with both[0], both[1]:
        wait_for(page, "document.getElementById('holder-rows').innerText.includes('of-cedar')")
        wait_for(
            page, "document.getElementById('holder-rows').innerText.includes('another tenant')"
        )
        assert "atlas" not in page.inner_text("body")
        others = page.evaluate(
            "[...Array(pageframe.pool.numBlocks).keys()]"
            ".filter((id) => pageframe.pool.columns.holder[id] === 0)"
        )
        point_at(page, others[0])
        wait_for(page, "document.getElementById('tip').innerText.includes('prefix index')")
        told = page.inner_text("#tip")
        assert "another tenant" in told
        assert "atlas" not in told
        assert page.inner_text("#stall-rows") == "shown to operators"


def num_resets(system):
    """How often a browser was so slow that it was told everything again, as metrics say."""
    url = f"http://{system.http_address}/metrics"
    headers = {"authorization": f"Bearer {OPERATOR_KEY}"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
        text = answer.read().decode()
    (value,) = re.findall(r"^pageframe_pool_viewer_resets_total (\S+)$", text, re.M)
    return float(value)


def points_at_a_holder(page):
    """Point at a shared block of the youngest sequence, if it is still held when that is told."""
    found = page.evaluate(
        "[...Array(pageframe.pool.numBlocks).keys()].filter((id) => id > 240 && id % 36 < 24"
        " && pageframe.pool.kind(id) === 'shared'"
        " && pageframe.pool.names.has(pageframe.pool.columns.holder[id]))"
        ".sort((one, other) => pageframe.pool.columns.holder[other]"
        " - pageframe.pool.columns.holder[one])"
    )
    if not found:
        return False
    point_at(page, found[0])
    wait_for(page, "document.getElementById('tip').innerText.includes('prefix index')")
    told = page.inner_text("#tip")
    return "held by" in told and "shared" in told


def test_it_shows_a_lively_pool(new_page, guarded, tmp_path):
    """The picture in the README comes from here; `make pictures` says where it goes."""
    folder = Path(os.environ.get("POOL_PAGE_PICTURES") or tmp_path)
    page = open_page(new_page, guarded, viewport={"width": 1440, "height": 980})
    page.wait_for_selector("#ask[open]")
    page.fill("#key", OPERATOR_KEY)
    page.press("#key", "Enter")
    wait_live(page)
    with Lively(guarded.address, seed=7) as traffic:
        eventually(lambda: traffic.num_ended >= 60, "sixty requests have ended")
        wait_for(page, "pageframe.pool.steps.length === 400")
        for kind in ("held", "shared", "pinned", "cached"):
            wait_for(
                page,
                "(kind) => pageframe.pool.tally().kinds[pageframe.pool.kinds.indexOf(kind)] > 20",
                arg=kind,
            )
        wait_for(page, "document.querySelectorAll('#tenant-rows tr').length >= 4")
        wait_for(page, "document.querySelectorAll('#stall-rows .meter').length >= 4")
        eventually(lambda: points_at_a_holder(page), "a block is pointed at that is still held")
        page.screenshot(path=folder / PICTURE)
        num_whole = page.evaluate("pageframe.pool.numWhole")
        assert num_whole <= 2 + num_resets(guarded), "changes were followed to the end"
    assert (folder / PICTURE).read_bytes().startswith(b"\x89PNG")
