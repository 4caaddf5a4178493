"""Whole engines in the GPU measurement: same model, same requests, figures from token times."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from bench.gpu import end_to_end, other_engines
from bench.gpu.__main__ import main
from bench.gpu.goals import GOALS
from bench.gpu.lab import LLAMA_3_8B, TINY, Lab, Measurement
from bench.gpu.loads import (
    LOADS,
    Answer,
    EngineError,
    Load,
    Request,
    check_answers,
    figures_of,
)
from bench.gpu.made_up import (
    MadeUpWeights,
    llama_config,
    make_up,
    num_weights_of_step,
    weight_shapes,
)
from bench.gpu.our_engine import Capacity, OurEngine
from bench.gpu.transformers_engine import TransformersEngine
from pageframe.core.errors import InvalidRequestError

_CPU = torch.device("cpu")
_REPOSITORY = Path(__file__).resolve().parents[3]
_CAPACITY = Capacity(num_tokens=64, num_sequences=2, max_model_len=32, num_step_tokens=16)
_REQUESTS = [Request([5, 6, 7, 8, 9], 4), Request([200, 3], 4)]


def _answer(*times_s):
    return Answer([1] * len(times_s), list(times_s))


# What is made up.


def test_made_up_weights_are_those_of_an_8b_model():
    total = sum(torch.Size(shape).numel() for shape in weight_shapes(LLAMA_3_8B).values())
    assert total == 8_030_261_248
    assert num_weights_of_step(LLAMA_3_8B) == total - 128_256 * 4_096


def test_a_tensor_is_the_same_alone_and_in_a_stack():
    names = [f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv"]
    shapes = weight_shapes(TINY)
    whole = MadeUpWeights(TINY, torch.float32, _CPU, lambda *_: None).read_stacked(
        names, sum(shapes[name][0] for name in names), TINY.hidden_size
    )
    parts = whole.split([shapes[name][0] for name in names])
    for name, part in zip(names, parts, strict=True):
        alone = torch.empty(shapes[name])
        make_up(name, alone)
        assert torch.equal(part, alone)
    assert not torch.equal(parts[1], parts[2])


def test_made_up_weights_of_another_shape_are_refused():
    weights = MadeUpWeights(TINY, torch.float32, _CPU, lambda *_: None)
    with pytest.raises(InvalidRequestError, match="does not fit"):
        weights.read("lm_head.weight", 3, TINY.hidden_size)


# Engines.


def test_both_engines_choose_the_same_tokens_of_the_same_model_time_after_time():
    answers = []
    for kind, turns in (
        (OurEngine, [_REQUESTS, _REQUESTS[::-1]]),
        (TransformersEngine, [_REQUESTS]),
    ):
        engine = kind(TINY, _CPU, torch.float32, _CAPACITY)
        try:
            for requests in turns:
                answers.append(engine.serve(requests))
                check_answers(requests, answers[-1])
        finally:
            engine.close()
    first, second, theirs = [[each.token_ids for each in answer] for answer in answers]
    assert first == second[::-1] == theirs
    assert first[0] != first[1]
    for each in (answer for turn in answers for answer in turn):
        assert each.times_s[0] > 0
        assert each.times_s == sorted(each.times_s)


def test_a_step_that_fails_is_told_in_its_words():
    engine = OurEngine(TINY, _CPU, torch.float32, _CAPACITY)
    engine.close()
    with pytest.raises(EngineError, match=r"ended with ERROR: .*the runner is closed"):
        engine.serve(_REQUESTS)


# Figures.


def test_figures_are_read_from_the_times_of_tokens():
    answers = [_answer(0.1, 0.2, 0.3, 0.4, 0.5, 1.6, 2.4), _answer(1.5, 2.3, 3.1)]
    figures = figures_of(answers)
    assert figures.tokens_per_second == pytest.approx(10 / 3.1)
    assert figures.first_token_s == pytest.approx(0.8)
    # All gaps: 0.1 four times, 1.1 and 0.8 of the first, 0.8 twice of the second.
    assert figures.gap_p50_s == pytest.approx(0.45)
    assert figures.gap_p99_s == pytest.approx(0.8 + 0.93 * 0.3)
    # Both decode from 1.5 to 2.4: one gap of each.
    assert figures.step_s == pytest.approx(0.8)


def test_requests_that_never_decode_at_once_have_no_step():
    assert figures_of([_answer(1.0, 2.0), _answer(3.0, 4.0)]).step_s is None


def test_a_request_that_lacks_tokens_is_no_answer():
    with pytest.raises(EngineError, match="request 1 got 2 of 4 tokens"):
        check_answers(_REQUESTS, [_answer(*range(4)), _answer(1.0, 2.0)])


def test_loads_are_the_same_lengths_with_other_tokens():
    load = LOADS[0]
    first, second = load.requests(LLAMA_3_8B, 1), load.requests(LLAMA_3_8B, 2)
    assert {len(each.prompt_token_ids) for each in first + second} == {1024}
    assert first == load.requests(LLAMA_3_8B, 1)
    assert first[0].prompt_token_ids[:16] != second[0].prompt_token_ids[:16]


def test_a_step_reads_weights_and_all_keys_and_values():
    lab = Lab(torch.device("cuda"), LLAMA_3_8B)
    (load,) = (load for load in LOADS if load.name == "64 x 4096")
    assert load.mean_context == 4096
    num_bytes = end_to_end.step_bytes(lab, load)
    assert num_bytes == 2 * num_weights_of_step(LLAMA_3_8B) + 64 * 4096 * 131_072
    # 11.5 ms at 4.3 TB/s.
    assert num_bytes / 4.3e12 == pytest.approx(11.5e-3, rel=0.01)


@pytest.mark.parametrize(
    ("step_ms", "verdicts"),
    [(12.8, ["stretch", "stretch"]), (14.0, ["pass", "pass"]), (14.5, ["FAIL", "FAIL"])],
)
def test_a_step_is_judged_by_time_and_by_its_floor(step_ms, verdicts):
    lab = Lab(torch.device("cuda"), LLAMA_3_8B)
    lab.found["copy"] = Measurement("copy", 1.0, 1.0, num_bytes=4_300_000_000_000)
    name = "step, 64 x 4096"
    lab.found[name] = Measurement(name, step_ms / 1e3, 0.0, num_bytes=49_450_000_000)
    goals = [goal for goal in GOALS if goal.name.startswith("8B step, 64 x 4096")]
    assert [goal.judge(lab)[1] for goal in goals] == verdicts


# Turns.


class _Playing:
    """An engine that gives tokens at once, or fails."""

    def __init__(self, name, log, error=None):
        self.name, self._log, self._error = name, log, error

    def facts(self):
        return {"version": "1"}

    def serve(self, requests):
        self._log.append((self.name, len(requests), requests[0].num_out))
        if self._error:
            raise self._error
        return [_answer(*range(1, request.num_out + 1)) for request in requests]

    def close(self):
        self._log.append((self.name, "closed"))


_LOADS = (Load("a", 2, 3, 60), Load("b", 1, 3, 5, is_for_all=False))


def test_engines_take_turns_and_warm_up_first():
    log, lab = [], Lab(_CPU, TINY)
    makers = {name: lambda name=name: _Playing(name, log) for name in ("ours", "other")}
    served = end_to_end.take_turns(lab, makers, _LOADS, num_rounds=2)
    short = [("ours", 2, 16), ("ours", 1, 5), ("other", 2, 16)]
    whole = [("ours", 2, 60), ("ours", 1, 5), ("other", 2, 60)]
    assert log == [*short, *whole, *whole, ("ours", "closed"), ("other", "closed")]
    assert [(each.engine, each.load, len(each.rounds)) for each in served] == [
        ("ours", "a", 2),
        ("ours", "b", 2),
        ("other", "a", 2),
    ]
    assert served[0].figures.step_s == 1.0
    assert lab.engines == {"ours": {"version": "1"}, "other": {"version": "1"}}


def test_an_engine_that_fails_is_out_with_its_reason_and_is_closed():
    log, lab = [], Lab(_CPU, TINY)
    makers = {
        "ours": lambda: _Playing("ours", log),
        "other": lambda: _Playing("other", log, RuntimeError("no memory\nat all")),
    }
    served = end_to_end.take_turns(lab, makers, _LOADS, num_rounds=1)
    assert [(each.engine, each.problem) for each in served if each.figures is None] == [
        ("other", "RuntimeError: no memory")
    ]
    assert log.count(("other", 2, 16)) == 1
    assert log[-1] == ("other", "closed")
    lab.served = [end_to_end.asdict(each) for each in served]
    assert "| a | other | not run: RuntimeError: no memory | | | |" in end_to_end.table(lab)


# Peers that are not here: what is called, and with what.


class _FakeLlm:
    made: ClassVar[list] = []

    def __init__(self, **arguments):
        self.config = json.loads((Path(arguments["model"]) / "config.json").read_text())
        self.arguments, self.calls, self._living = arguments, [], {}
        self.llm_engine = self
        _FakeLlm.made.append(self)

    def add_request(self, request_id, prompt, params):
        self.calls.append((request_id, prompt, params))
        self._living[request_id] = [0, params["max_tokens"]]

    def has_unfinished_requests(self):
        return bool(self._living)

    def step(self):
        outputs = []
        for request_id, entry in list(self._living.items()):
            entry[0] += 1
            tokens = types.SimpleNamespace(token_ids=list(range(100, 100 + entry[0])))
            outputs.append(types.SimpleNamespace(request_id=request_id, outputs=[tokens]))
            if entry[0] == entry[1]:
                del self._living[request_id]
        return outputs


def _install(monkeypatch, name, **contents):
    module = types.ModuleType(name)
    module.__version__ = "9.9"
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


def test_vllm_is_asked_for_weights_of_its_own_and_given_token_ids(monkeypatch):
    _install(monkeypatch, "vllm", LLM=_FakeLlm, SamplingParams=dict)
    engine = other_engines.VllmEngine(TINY, _CPU, torch.bfloat16, _CAPACITY)
    fake = _FakeLlm.made[-1]
    assert fake.config == llama_config(TINY, 32)
    chosen = {key: fake.arguments[key] for key in sorted(fake.arguments) if key != "model"}
    assert chosen == {
        **other_engines.fixed_arguments("vllm"),
        "dtype": "bfloat16",
        "max_model_len": 32,
        "max_num_batched_tokens": 16,
        "max_num_seqs": 2,
    }
    assert chosen["enable_prefix_caching"] is False
    for repetition in range(2):
        answers = engine.serve(_REQUESTS)
        check_answers(_REQUESTS, answers)
        assert answers[0].token_ids == [100, 101, 102, 103]
        assert answers[0].times_s == sorted(set(answers[0].times_s))
        assert fake.calls[2 * repetition] == (
            str(2 * repetition + 1),
            {"prompt_token_ids": [5, 6, 7, 8, 9]},
            {"temperature": 0.0, "max_tokens": 4, "ignore_eos": True, "detokenize": False},
        )
    assert engine.facts() == {"vllm": "9.9"}
    folder = Path(fake.arguments["model"])
    engine.close()
    assert not folder.exists()


class _FakeSglang:
    made: ClassVar[list] = []

    def __init__(self, **arguments):
        import asyncio

        self.config = json.loads((Path(arguments["model_path"]) / "config.json").read_text())
        self.arguments, self.calls, self.is_down = arguments, [], False
        self.loop = asyncio.new_event_loop()
        _FakeSglang.made.append(self)

    async def async_generate(self, **arguments):
        import asyncio

        self.calls.append(arguments)

        async def chunks():
            # The second token and the third come in one chunk.
            for count in (1, 3, arguments["sampling_params"]["max_new_tokens"]):
                await asyncio.sleep(0)
                yield {"output_ids": [], "meta_info": {"completion_tokens": count}}

        return chunks()

    def shutdown(self):
        self.is_down = True
        self.loop.close()


def test_sglang_is_asked_for_weights_of_its_own_and_given_token_ids(monkeypatch):
    _install(monkeypatch, "sglang", Engine=_FakeSglang)
    engine = other_engines.SglangEngine(TINY, _CPU, torch.bfloat16, _CAPACITY)
    fake = _FakeSglang.made[-1]
    assert fake.config == llama_config(TINY, 32)
    chosen = {key: fake.arguments[key] for key in sorted(fake.arguments) if key != "model_path"}
    assert chosen == {
        **other_engines.fixed_arguments("sglang"),
        "chunked_prefill_size": 16,
        "context_length": 32,
        "dtype": "bfloat16",
        "max_running_requests": 2,
    }
    assert chosen["disable_radix_cache"] is True
    answers = engine.serve(_REQUESTS)
    check_answers(_REQUESTS, answers)
    first, second, third, *_ = answers[0].times_s
    assert first < second == third
    assert fake.calls[1] == {
        "input_ids": [200, 3],
        "sampling_params": {"temperature": 0.0, "max_new_tokens": 4, "ignore_eos": True},
        "stream": True,
    }
    engine.close()
    assert fake.is_down


def _dry_run(*words):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--dry-run", *words],
        cwd=_REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("peer", ["vllm", "sglang"])
def test_a_peer_that_is_not_here_is_one_line(peer, capsys):
    assert main(["--peer", peer]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    assert line.startswith(f"{peer} cannot be imported here (No module named '{peer}'): install it")


def test_kernels_of_vllm_without_its_engine_are_no_engine(monkeypatch):
    _install(monkeypatch, "vllm")
    with pytest.raises(EngineError, match="has no attribute 'LLM'"):
        other_engines.check_installed("vllm")


def test_a_dry_run_serves_all_loads_with_both_engines(tmp_path):
    path = tmp_path / "gpu.json"
    done = _dry_run("--only", "end-to-end", "--json", str(path))
    assert done.returncode == 0, done.stderr + done.stdout
    report = json.loads(path.read_text())
    served = {(each["engine"], each["load"]): each for each in report["served"]}
    assert len(served) == 2 * len(LOADS) - 1
    assert all(each["problem"] == "" for each in served.values())
    assert report["goals"]["8B step, batch 1, ms"][1] == "dry run"
    steps = {each["name"]: each["peers"] for each in report["measurements"]}
    assert isinstance(steps["step, 64 x 1024"]["transformers"], float)
    assert steps["step, 64 x 4096"] == {}
    assert set(report["engines"]) == {"Pageframe", "transformers"}
