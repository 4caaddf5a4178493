"""Virtual time: who waits how long, under which policy; arrivals from files and distributions."""

import json
from pathlib import Path

import numpy as np
import pytest

from pageframe.core.errors import InvalidRequestError
from pageframe.lab.simulate import Policy, compare, configure, parse_policy
from pageframe.lab.simulate_arrivals import (
    Arrival,
    poisson_arrivals,
    read_arrivals,
    share_prefixes,
    sharegpt_arrivals,
)
from pageframe.lab.simulate_cost import H200_8B, DeviceCost, parse_cost
from pageframe.lab.simulate_figures import Objectives, figures_of
from pageframe.lab.virtual import VirtualConfig, VirtualRun, VirtualServer
from pageframe.scheduler.options import SchedulerOptions

MS = 1e6
TEN_MS = DeviceCost(name="ten", base_ns=10 * MS)


def serve(arrivals: list[Arrival], *, cost=TEN_MS, num_blocks=1000, **options) -> VirtualRun:
    options = {"token_budget": 64, "max_num_running": 8} | options
    config = VirtualConfig(cost=cost, options=SchedulerOptions(**options), num_blocks=num_blocks)
    return VirtualServer(config).serve(arrivals)


def arrival(at_s: float, prompt: int, output: int, **fields) -> Arrival:
    return Arrival(arrival_s=at_s, num_prompt_tokens=prompt, num_output_tokens=output, **fields)


def test_each_step_lasts_what_the_formula_says():
    run = serve([arrival(0.0, 100, 3)])
    # 64 tokens, 36 tokens with the first output, two more outputs.
    assert run.steps.end_ns.tolist() == [10 * MS, 20 * MS, 30 * MS, 40 * MS]
    assert run.steps.num_tokens.tolist() == [0, 1, 1, 1]
    assert run.steps.num_computed.tolist() == [64, 36, 1, 1]
    figures = figures_of(run, Objectives())
    assert (figures.num_finished, figures.num_good) == (1, 1)
    assert figures.ttft_s.p50 == pytest.approx(0.020)
    assert figures.itl_s.max == pytest.approx(0.010)
    assert figures.latency_s.p50 == pytest.approx(0.040)
    assert figures.goodput_per_s == pytest.approx(1 / 0.040)


def test_a_cost_has_its_parts():
    cost = parse_cost("base=1ms,decode=10us,context=100ns,prefill=1us,pair=10ns")
    run = serve([arrival(0.0, 10, 3)], cost=cost)
    prefill = 1e6 + 10 * 1e3 + 55 * 10
    first = 1e6 + 10e3 + 11 * 100
    second = 1e6 + 10e3 + 12 * 100
    assert run.steps.end_ns.tolist() == [prefill, prefill + first, prefill + first + second]


def test_time_is_skipped_while_nobody_is_there():
    run = serve([arrival(1.0, 4, 2), arrival(1000.0, 4, 2)])
    assert run.steps.end_ns.tolist() == [1.01e9, 1.02e9, 1000.01e9, 1000.02e9]


def test_what_comes_during_a_step_waits_for_the_next_plan():
    # Step 2 is planned when step 1 starts, so what comes meanwhile is in step 3.
    run = serve([arrival(0.0, 4, 5), arrival(0.005, 4, 1)])
    ids, times = run.token_times()
    assert ids.tolist() == [1] * 5 + [2]
    assert times[-1] == 30 * MS


def test_what_comes_early_in_a_long_step_is_in_the_next_one():
    cost = parse_cost("base=1ms,prefill=1ms")
    arrivals = [arrival(0.0, 300, 1), arrival(1.0, 300, 4), arrival(1.05, 4, 1), arrival(1.2, 5, 1)]
    run = serve(arrivals, cost=cost, token_budget=512)
    # Behind the second step, which takes 301 ms, the plan is made in good time for its end.
    assert run.steps.num_computed.tolist() == [300, 300, 1 + 4, 1 + 5, 1]


def test_the_8b_model_has_the_steps_of_its_sources():
    # Floors of 7.5 ms for 32 x 4k and 3.5 ms alone, times 1.25.
    class Batch:
        num_decodes = 32
        context_lens = np.full(32, 4096)
        token_ids = np.zeros(32)

    assert H200_8B.of(Batch) == pytest.approx(1.25 * 7.5 * MS, rel=0.02)
    assert H200_8B.base_ns == pytest.approx(1.25 * 3.5 * MS, rel=0.01)
    assert H200_8B.num_blocks(16) == 52452


def test_samples_and_prefixes_share():
    prompt = {"prefix_id": "a", "num_prefix_tokens": 64}
    run = serve([arrival(0.0, 80, 4, num_samples=3, **prompt), arrival(1.0, 80, 4, **prompt)])
    figures = figures_of(run, Objectives())
    assert figures.num_finished == 2
    assert len(run.completions) == 4
    assert figures.cached_share == pytest.approx(64 / (4 * 80))
    assert figures.recomputed_share == 0


def test_preemptions_and_what_they_cost_are_counted():
    run = serve(
        [arrival(0.0, 60, 100) for _ in range(8)], num_blocks=40, policies={"recovery": "recompute"}
    )
    figures = figures_of(run, Objectives())
    assert figures.num_finished == 8
    assert figures.num_preemptions > 0
    assert figures.recomputed_share > 0
    assert figures.peak_blocks_share == pytest.approx(1.0, abs=0.1)


def test_deadlines_and_refusals_are_counted():
    run = serve(
        [
            arrival(0.0, 64, 500, deadline_s=0.1),
            arrival(0.0, 40_000, 5),
            arrival(0.0, 4, 1),
        ]
    )
    figures = figures_of(run, Objectives())
    assert (figures.num_finished, figures.num_failed, figures.num_refused) == (1, 1, 1)
    assert dict(run.refused) == {"CONTEXT_TOO_LONG": 1}


def test_good_is_who_got_every_token_in_time():
    fast = serve([arrival(0.0, 4, 50), arrival(0.0, 4, 50)])
    assert figures_of(fast, Objectives(ttft_s=0.011, itl_s=0.011)).num_good == 2
    assert figures_of(fast, Objectives(ttft_s=0.009, itl_s=0.011)).num_good == 0
    assert figures_of(fast, Objectives(ttft_s=0.011, itl_s=0.009)).num_good == 0


def test_the_same_arrivals_give_the_same_run():
    arrivals = sharegpt_arrivals(50, 20, seed=3)
    first, second = (serve(arrivals, cost=H200_8B) for _ in range(2))
    assert first.steps == second.steps
    assert first.steps.end_ns != serve(sharegpt_arrivals(50, 20, seed=4)).steps.end_ns


@pytest.mark.parametrize(
    ("text", "name", "settings"),
    [
        ("", "default", {}),
        ("fcfs", "fcfs", {"order-policy": "fcfs"}),
        ("victim=youngest,recovery=swap", "victim=youngest,recovery=swap",
         {"victim-policy": "youngest", "recovery": "swap"}),
        ("big:token_budget=8192,fair", "big", {"token-budget": "8192", "order-policy": "fair"}),
        ("q:tenant-quotas=a=1:2,b=3:", "q", {"tenant-quotas": "a=1:2,b=3:"}),
    ],
)  # fmt: skip
def test_a_policy_is_settings_and_names(text, name, settings):
    assert parse_policy(text) == Policy(name, settings)


def test_a_policy_that_says_nothing_is_refused():
    with pytest.raises(InvalidRequestError, match="neither KEY=VALUE nor the name") as caught:
        parse_policy("colour=blue")
    assert caught.value.reason == "POLICY_MALFORMED"


def test_settings_of_a_policy_are_checked():
    with pytest.raises(InvalidRequestError, match="token-budget"):
        configure(Policy("p", {"token-budget": "-3"}), {}, TEN_MS)


def test_settings_reach_the_scheduler_and_the_pool():
    base = {"token-budget": "100", "num-blocks": "77", "block-size": "32"}
    config = configure(parse_policy("target-itl-ms=20,token-budget=200"), base, TEN_MS)
    assert config.options.token_budget == 200
    assert config.options.target_itl_ns == 20 * MS
    assert (config.num_blocks, config.block_size) == (77, 32)
    assert configure(Policy("p", {}), {}, H200_8B).num_blocks == H200_8B.num_blocks(16)


def test_policies_are_compared_over_the_same_arrivals():
    arrivals = [arrival(0.0, 4, 200), arrival(0.3, 4000, 1)]
    policies = [parse_policy(text) for text in ("token-budget=8192", "token-budget=128")]
    configs = [(policy, configure(policy, {}, H200_8B)) for policy in policies]
    seen: list[tuple[str, float]] = []
    whole, cut = compare(
        configs, arrivals, Objectives(), on_progress=lambda name, share: seen.append((name, share))
    )
    assert whole.figures.itl_s.max > 5 * cut.figures.itl_s.max
    assert whole.figures.ttft_s.max < cut.figures.ttft_s.max
    assert seen[-1] == ("token-budget=128", 1.0)


def test_a_target_keeps_the_time_between_tokens_beside_long_prompts():
    decodes = [arrival(0.0, 1000, 400) for _ in range(16)]
    prompts = [arrival(1.0 + 0.12 * index, 4000, 2) for index in range(8)]
    longest = {}
    for target_ns in (0, 12 * MS):
        run = serve(
            decodes + prompts,
            cost=H200_8B,
            num_blocks=5000,
            token_budget=8192,
            max_num_running=64,
            target_itl_ns=round(target_ns),
        )
        ids, times = run.token_times()
        is_gap = (np.diff(ids, prepend=-1) == 0) & (times > 0.9e9)
        longest[target_ns] = np.diff(times, prepend=0)[is_gap].max()
        assert len(run.completions) == 24
    assert longest[0] > 100 * MS
    assert longest[12 * MS] <= 12 * MS


def test_arrivals_of_a_file_come_in_order_of_time(tmp_path: Path):
    path = tmp_path / "arrivals.jsonl"
    lines = [
        {"arrival_s": 2, "num_prompt_tokens": 8, "max_tokens": 3, "tenant": "a", "priority": 1},
        {"arrival_s": 1.5, "prompt_token_ids": [1, 2, 3], "num_output_tokens": 1},
        {"arrival_s": 3, "num_prompt_tokens": 8, "num_output_tokens": 3, "prefix_id": "p"},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    first, second, third = read_arrivals(path)
    assert first == arrival(1.5, 3, 1, prompt_token_ids=(1, 2, 3))
    assert second == arrival(2.0, 8, 3, tenant="a", priority=1)
    assert third.num_prefix_tokens == 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "JSON object"),
        ("{", "line 1"),
        ('{"arrival_s": 1, "num_prompt_tokens": 3}', "num_output_tokens"),
        ('{"arrival_s": 1, "max_tokens": 3}', "num_prompt_tokens or prompt_token_ids"),
        ('{"num_prompt_tokens": 3, "max_tokens": 3}', "arrival_s"),
        ('{"arrival_s": "x", "num_prompt_tokens": 3, "max_tokens": 3}', "type float"),
        ('{"arrival_s": 1, "prompt_token_ids": [-1], "max_tokens": 3}', "whole numbers"),
        ('{"arrival_s": 1, "num_prompt_tokens": true, "max_tokens": 3}', "type int"),
        ('{"arrival_s": 1, "num_prompt_tokens": 3, "max_tokens": 3, "colour": 1}', "colour"),
    ],
)
def test_a_malformed_arrival_is_named_with_its_line(tmp_path: Path, line, message):
    path = tmp_path / "arrivals.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InvalidRequestError, match=message) as caught:
        read_arrivals(path)
    assert caught.value.reason == "ARRIVALS_MALFORMED"


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(InvalidRequestError, match="nowhere"):
        read_arrivals(tmp_path / "nowhere")


def test_random_arrivals_have_the_rate_and_the_means_that_were_asked_for():
    drawn = poisson_arrivals(20_000, 50.0, mean_prompt_tokens=300, mean_output_tokens=100, seed=1)
    assert drawn[-1].arrival_s == pytest.approx(400, rel=0.03)
    assert np.mean([it.num_prompt_tokens for it in drawn]) == pytest.approx(300, rel=0.03)
    assert np.mean([it.num_output_tokens for it in drawn]) == pytest.approx(100, rel=0.03)
    real = sharegpt_arrivals(5000, 50.0, seed=1)
    assert np.mean([it.num_output_tokens for it in real]) == pytest.approx(331, rel=0.05)


def test_system_prompts_lie_before_prompts():
    before = poisson_arrivals(20, 5, mean_prompt_tokens=30, mean_output_tokens=3, seed=1)
    after = share_prefixes(before, 2, 100, seed=1)
    assert [it.num_prompt_tokens - 100 for it in after] == [it.num_prompt_tokens for it in before]
    assert {it.prefix_id for it in after} == {"0", "1"}


@pytest.mark.parametrize("text", ["base", "base=3", "speed=3ms", "base=3 parsecs", ""])
def test_a_malformed_cost_is_refused(text):
    with pytest.raises(InvalidRequestError) as caught:
        parse_cost(text)
    assert caught.value.reason == "COST_MALFORMED"
