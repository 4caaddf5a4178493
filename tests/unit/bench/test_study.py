"""The whole of it on a small scale: every stage runs, and all claims are filled in."""

import json

import pytest

from bench.paper.figures import draw_all
from bench.paper.report import write_results
from bench.paper.study import Effort, run_study
from bench.paper.verdict import all_claims

TINY = Effort(
    num_backlog_requests=100,
    rate_duration_s=20.0,
    roofline_duration_s=20.0,
    rate_seeds=(1,),
    sharegpt_duration_s=10.0,
    alpaca_duration_s=2.0,
    num_parallel_requests=2,
    num_beam_requests=1,
    alpaca_factor=4,
    sweep_duration_s=4.0,
    num_sweep_requests=8,
    pageframe_rates_per_s=(1, 20),
    roofline_rates_per_s=(1, 20),
    orca_rates_per_s=(0.5, 20),
    block_sizes=(16, 128),
    beam_widths=(2, 8),
)


@pytest.mark.slow
def test_every_claim_of_the_paper_is_measured_written_and_drawn(tmp_path):
    results = run_study(TINY)
    claims = all_claims(results)
    write_results(results, claims, tmp_path)
    figures = draw_all(results, tmp_path)
    rows = json.loads((tmp_path / "paper.json").read_text(encoding="utf-8"))
    assert len(rows) == len(claims)
    for row in rows:
        assert {"claim", "source", "paper", "ours", "pass"} <= set(row)
        assert row["pass"] in ((None,) if row["rule"] == "not judged" else (True, False))
        # Twenty seconds are too short for the latency to go up; then there is no rate to compare.
        assert row["ours"] is not None or "request" in row["claim"], row
    assert len({row["claim"] for row in rows}) == len(rows)
    page = (tmp_path / "paper.md").read_text(encoding="utf-8")
    for figure in figures:
        assert figure.stat().st_size > 10_000
        assert f"({figure.name})" in page
