"""All goals of a CPU in one command: what is run, and what is said of the figures."""

import json
import sys
from pathlib import Path

import pytest

import bench.__main__ as command
from bench import cpu_goals
from bench.cpu_goals import Finding


def row(
    workload: str,
    engine: str,
    tokens_per_s: float,
    *,
    token_ms: float | None = None,
    is_served: bool = False,
):
    return {
        "workload": workload,
        "engine": engine,
        "is_served": is_served,
        "output_tokens_per_s": tokens_per_s,
        "token_ms": token_ms,
    }


def found(
    judge: cpu_goals.Judge, figures: cpu_goals.Figures
) -> list[tuple[str, float | None, str]]:
    return [
        (each.what, None if each.found is None else round(each.found, 3), each.verdict)
        for each in judge(figures)
    ]


def test_engines_are_compared_with_the_best_peer_of_each_workload():
    rows = [
        row("A", "pageframe, served", 120),
        row("A", "slow", 60),
        row("A", "fast", 100),
        row("D", "pageframe, served", 114),
        row("D", "fast", 100),
    ]
    assert found(cpu_goals.of_engines, {"rows": rows}) == [
        ("A: pageframe, served, times fast", 1.2, "met"),
        ("D: pageframe, served, times fast", 1.14, "MISSED"),
    ]


def test_what_is_served_is_compared_with_what_is_served():
    rows = [
        row("A", "pageframe", 130),
        row("A", "pageframe, served", 120, is_served=True),
        row("A", "peer", 110),
        row("A", "peer's server", 100, is_served=True),
        row("A", "slow server", 50, is_served=True),
    ]
    assert found(cpu_goals.of_engines, {"rows": rows}) == [
        ("A: pageframe, times peer", 1.182, "met"),
        ("A: pageframe, served, times peer's server", 1.2, "met"),
    ]


def test_a_single_stream_is_compared_by_the_time_of_a_token():
    # By tokens a second, the time to the first token would count as well.
    rows = [row("E", "pageframe", 10, token_ms=12.5), row("E", "peer", 70, token_ms=18.75)]
    assert found(cpu_goals.of_engines, {"rows": rows}) == [("E: pageframe, times peer", 1.5, "met")]


def test_engines_without_a_peer_are_not_judged():
    rows = [row("B", "pageframe", 10)]
    assert found(cpu_goals.of_engines, {"rows": rows})[0][1:] == (None, "not measured")


def test_attention_is_compared_with_reading_of_the_same_run():
    shape = {"dtype": "bf16", "num_sequences": 16, "context_len": 256}
    shape["part_of_plain_read"] = {"built": 0.5, "reading": 0.9}
    figures = {"num_threads": 2, "read_num_threads": 2, "shapes": [shape]}
    what = "attention, bf16, 16 x 256, times a plain read, threads: 2"
    assert found(cpu_goals.of_attention, figures) == [(what, 0.5, "met")]
    # Two threads beside what one can read would say nothing.
    figures["read_num_threads"] = 1
    assert found(cpu_goals.of_attention, figures) == [(what, None, "not measured")]


def test_the_slowest_start_counts():
    here = {"ready_s": {"min": 3, "max": 5.1}, "first_token_s": {"min": 0.1, "max": 0.2}}
    assert found(cpu_goals.of_starting, {"checkouts": {"here": here}}) == [
        ("ready after, s", 5.1, "MISSED"),
        ("first token after that, s", 0.2, "met"),
    ]


def test_kept_figures_have_what_is_judged():
    judges = {
        "engines": cpu_goals.of_engines,
        "cpu_attention": cpu_goals.of_attention,
        "starting": cpu_goals.of_starting,
    }
    for name, judge in judges.items():
        figures = json.loads((command.RESULTS / f"{name}.json").read_text())
        assert all(finding.found is not None for finding in judge(figures)), name


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> dict[str, command.Part]:
    """Parts that only write; the tests say which."""
    made: dict[str, command.Part] = {}
    monkeypatch.setattr(command, "PARTS", made)
    return made


def part_that(program: str, *, is_told: bool = False) -> command.Part:
    return command.Part(
        lambda _, path: [sys.executable, "-c", program, str(path)],
        lambda figures: iter([Finding(what="speed", found=figures["speed"], border=2)]),
        is_told,
    )


WRITES = "import sys; open(sys.argv[1], 'w').write('{\"speed\": 3}'); sys.exit(1)"
TELLS = "print('{\"speed\": 1}')"


def test_figures_count_whatever_the_part_says_of_itself(parts, tmp_path: Path, capfd):
    parts |= {"written": part_that(WRITES), "told": part_that(TELLS, is_told=True)}
    assert command.main(["--folder", str(tmp_path)]) == 1
    lines = capfd.readouterr().out.splitlines()
    assert lines[2:] == ["| speed | 3.000 | >= 2 | met |", "| speed | 1.000 | >= 2 | MISSED |"]
    assert json.loads((tmp_path / "told.json").read_text()) == {"speed": 1}
    assert command.main(["--folder", str(tmp_path), "--only", "written"]) == 0


def test_a_part_without_figures_is_told_and_does_not_take_the_others_along(parts, tmp_path, capfd):
    # Figures of another day are no figures.
    (tmp_path / "broken.json").write_text('{"speed": 9}')
    parts |= {"broken": part_that("raise SystemExit(3)"), "written": part_that(WRITES)}
    assert command.main(["--folder", str(tmp_path)]) == 1
    told = capfd.readouterr()
    assert told.out.splitlines()[2:] == [
        "| broken |  | >= 0 | not measured |",
        "| speed | 3.000 | >= 2 | met |",
    ]
    assert "exit code 3 and no figures" in told.err
