"""The measurement on a GPU: it runs dry without one, and its verdicts are those of the figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu.__main__ import measure
from bench.gpu.goals import GOALS, Goal
from bench.gpu.lab import LLAMA_3_8B, TINY, Lab, Measurement

_REPOSITORY = Path(__file__).resolve().parents[3]


def _run(*words):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "bench.gpu", *words],
        cwd=_REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_dry_run_measures_every_part_it_is_asked_for(tmp_path):
    path = tmp_path / "gpu.json"
    parts = ("copy", "decode-quantised", "block-copies", "swaps", "swaps-beside-steps", "norm")
    words = [word for part in parts for word in ("--only", part)]
    done = _run("--dry-run", "--json", str(path), *words)
    assert done.returncode == 0, done.stderr + done.stdout
    report = json.loads(path.read_text())
    names = {each["name"] for each in report["measurements"]}
    assert {"copy", "decode fp8", "block copy", "residual and norm, 64 tokens"} <= names
    assert report["goals"]["block copy, 64 x 2 MiB, share of copy"][1] == "dry run"
    assert report["goals"]["prefill 4096, TFLOP/s"] == [None, "not measured: prefill 4096"]
    assert report["skipped"] == {}
    assert "dry run" in report["machine"]["device"]


def test_time_that_is_over_is_told():
    done = _run("--dry-run", "--only", "copy", "--seconds", "-1")
    assert done.returncode == 1
    assert "skipped copy: -1 seconds were over" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device here")
def test_without_a_device_it_says_so_and_measures_nothing():
    done = _run()
    assert done.returncode == 2
    assert "NO CUDA DEVICE" in done.stderr
    assert done.stdout == ""


def _lab(**seconds):
    lab = Lab(torch.device("cuda"), LLAMA_3_8B)
    for name, taken in seconds.items():
        lab.found[name] = Measurement(name, taken, taken, num_bytes=1000)
    return lab


@pytest.mark.parametrize(
    ("seconds", "verdict"), [(3e-6, "stretch"), (4e-6, "pass"), (5e-6, "pass"), (5.1e-6, "FAIL")]
)
def test_a_time_is_judged_by_both_borders(seconds, verdict):
    goal = Goal("k, us", lambda lab: lab.found["k"].seconds * 1e6, 5, 3)
    value, word = goal.judge(_lab(k=seconds))
    assert (value, word) == (pytest.approx(seconds * 1e6), verdict)


@pytest.mark.parametrize(("seconds", "verdict"), [(1.0, "stretch"), (1.2, "pass"), (1.3, "FAIL")])
def test_a_rate_is_judged_the_other_way_round(seconds, verdict):
    goal = Goal("k", lambda lab: lab.found["k"].bytes_per_second, 800, 1000, is_low_better=False)
    assert goal.judge(_lab(k=seconds))[1] == verdict


def test_only_peers_that_ran_count():
    name = "decode 64 x 4096"
    (goal,) = (goal for goal in GOALS if "times the better" in goal.name)
    lab = _lab(**{name: 2e-4})
    lab.found[name].peers = {"FlashAttention 3": "not run: ImportError", "FlashInfer": 1.9e-4}
    assert goal.judge(lab) == (pytest.approx(0.95), "pass")
    lab.found[name].peers["FlashAttention 3"] = 1.5e-4
    assert goal.judge(lab)[1] == "FAIL"
    lab.found[name].peers = {"FlashAttention 3": "not run", "SDPA, dense": 1e-4}
    assert goal.judge(lab)[1] == f"not measured: no peer ran beside {name}"


@pytest.mark.parametrize(("both", "verdict"), [(5.2, "stretch"), (5.7, "pass"), (9.0, "FAIL")])
def test_a_swap_is_judged_by_the_longer_of_what_runs_at_once(both, verdict):
    (goal,) = (goal for goal in GOALS if goal.name.startswith("swaps beside steps"))
    name = "swaps beside steps"
    lab = _lab(**{name: both})
    lab.found[name].peers = {"steps alone": 5.0, "swaps alone": 4.0}
    assert goal.judge(lab) == (pytest.approx(both / 5), verdict)
    lab.found[name].peers["steps alone"] = "not run: OutOfMemoryError"
    assert goal.judge(lab) == (None, f"not measured: no peer ran beside {name}")


def test_what_was_found_is_saved_after_each_part():
    lab, saved = Lab(torch.device("cpu"), TINY), []

    def found(name):
        lab.found[name] = Measurement(name, 1.0, 1.0)

    def broken(_):
        raise RuntimeError("no memory")

    parts = {"a": lambda _: found("a"), "b": broken, "c": lambda _: found("c")}
    measure(lab, parts, 60.0, lambda: saved.append((list(lab.found), dict(lab.skipped))))
    told = {"b": "RuntimeError: no memory"}
    assert saved == [(["a"], {}), (["a"], told), (["a", "c"], told)]
