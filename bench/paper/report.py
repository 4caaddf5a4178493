"""The results in writing: a JSON list of claims, all figures behind it, and a table for people."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from bench.paper.claims import Claim
from bench.paper.cost_model import ROOFLINE, SERVER, CostModel
from bench.paper.lengths import Lengths
from bench.paper.rates import LATENCIES_S, Curve, rate_at
from bench.paper.study import Results
from bench.paper.sweeps import BeamWidthPoint, BlockSizePoint

_PERCENT_WORDS = ("share of", "blocks saved")
_PART_DIFFERENT = 0.05
_NS_PER_MS = 1e6
_MARKS = {True: "yes", False: "**no**", None: "–"}


def write_results(results: Results, claims: Sequence[Claim], folder: Path) -> None:
    """Write ``paper.json``, ``paper_data.json`` and ``paper.md`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "paper.json", [claim.to_json() for claim in claims])
    _write_json(folder / "paper_data.json", _data(results))
    (folder / "paper.md").write_text(_page(results, claims), encoding="utf-8")


def claim_line(claim: Claim) -> str:
    """One claim on one line, for the terminal."""
    paper, ours = (_value(claim, value) for value in (claim.paper, claim.ours))
    mark = {True: "yes", False: "NO", None: "-"}[claim.has_passed]
    return f"{mark:>4}  {claim.claim:<78} {paper:>8} {ours:>8}"


def _write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _data(results: Results) -> dict[str, object]:
    return {
        "lengths": [_lengths_row(lengths) for lengths in results.lengths],
        "occupancy": {
            name: [occupancy.to_json() for occupancy in systems]
            for name, systems in results.occupancy.items()
        },
        "sharegpt_at_rate": [occupancy.to_json() for occupancy in results.sharegpt_at_rate],
        "alpaca_at_rate": [occupancy.to_json() for occupancy in results.alpaca_at_rate],
        "curves": [curve.to_json() for curve in results.curves.values()],
        "roofline_curves": [curve.to_json() for curve in results.roofline_curves.values()],
        "parallel": [sharing.to_json() for sharing in results.parallel],
        "beams": [sharing.to_json() for sharing in results.beams],
        "block_sizes": [point.to_json() for point in results.block_sizes],
        "beam_widths": [point.to_json() for point in results.beam_widths],
    }


def _lengths_row(lengths: Lengths) -> dict[str, object]:
    return {
        "name": lengths.name,
        "num_requests": len(lengths),
        "mean_prompt_tokens": round(float(lengths.num_prompt_tokens.mean()), 2),
        "mean_output_tokens": round(float(lengths.num_output_tokens.mean()), 2),
    }


def _page(results: Results, claims: Sequence[Claim]) -> str:
    judged = [claim for claim in claims if claim.has_passed is not None]
    num_passed = sum(bool(claim.has_passed) for claim in judged)
    parts = [
        "# The paper's memory tables",
        "Made by `make paper`. Paper: Kwon et al., SOSP 2023, arXiv 2309.06180. Scheduler, engine "
        "and KV memory are the real ones; the model is the simulated runner, in virtual time. "
        "Beam search drives the engine itself, by recorded ancestry.",
        f"{num_passed} of {len(judged)} claims are borne out.",
        _table(
            ("claim", "paper", "ours", "borne out", "rule"),
            [
                (
                    f"{claim.claim} ({claim.source})",
                    _value(claim, claim.paper),
                    _value(claim, claim.ours),
                    _MARKS[claim.has_passed],
                    claim.rule.value,
                )
                for claim in claims
            ],
        ),
        "## Where ours differs by more than a twentieth, and why",
        _differences(claims),
        "## Lengths",
        _table(
            ("data", "requests", "mean tokens in", "mean tokens out"),
            [tuple(map(str, _lengths_row(lengths).values())) for lengths in results.lengths],
        ),
        "## Cost of a step",
        _table(
            ("model", "slots", "every step", "each token", "each token of context"),
            [_cost_row(cost) for cost in (SERVER, ROOFLINE)],
        ),
        "## Requests per second at a latency",
        *(
            _rate_table(title, curves)
            for title, curves in (
                (SERVER.name, results.curves),
                (ROOFLINE.name, results.roofline_curves),
            )
        ),
        "![latency](paper_rates.png)",
        "## Where memory goes",
        "![memory](paper_memory.png)",
        "## Sharing",
        "![sharing](paper_sharing.png)",
        "## Block sizes",
        _block_size_table(results.block_sizes),
        "![block sizes](paper_block_sizes.png)",
        "## Beam widths",
        _beam_width_table(results.beam_widths),
        _break_even_sentence(results.beam_widths),
        "![beam widths](paper_beam_widths.png)",
    ]
    return "\n\n".join(parts) + "\n"


def _differences(claims: Sequence[Claim]) -> str:
    lines = [
        f"- {claim.claim}: {_value(claim, claim.paper)} in the paper, "
        f"{_value(claim, claim.ours)} here. {_sentence(claim.note)}"
        for claim in claims
        if abs(claim.ours / claim.paper - 1) > _PART_DIFFERENT
    ]
    return "\n".join(lines) or "Nowhere."


def _sentence(note: str) -> str:
    return f"{note[:1].upper()}{note[1:]}." if note else ""


def _cost_row(cost: CostModel) -> tuple[str, ...]:
    return (
        cost.name,
        f"{cost.num_slots:,}",
        f"{cost.step_ns / _NS_PER_MS:.1f} ms",
        f"{cost.token_ns / 1e3:.0f} us",
        f"{cost.context_token_ns / 1e3:.2f} us",
    )


def _rate_table(title: str, curves: dict[str, Curve]) -> str:
    header = (title, *(f"{latency} s per token" for latency in LATENCIES_S))
    rows = [
        (name, *(_plain(rate_at(curve.points, latency)) for latency in LATENCIES_S))
        for name, curve in curves.items()
    ]
    return _table(header, rows)


def _block_size_table(points: Sequence[BlockSizePoint]) -> str:
    width = points[0].sharing.num_sequences if points else 0
    header = (
        "block size",
        "waste",
        "block tables",
        f"saved, {width} beams",
        "copies of a full step",
        "may cost",
        "speed with sharing / without",
    )
    rows = [
        (
            str(point.block_size),
            f"{100 * point.wasted_share:.2f} %",
            f"{point.table_bytes / 1024:.1f} KiB",
            f"{100 * point.sharing.saved_share:.1f} %",
            f"{point.balance.copy_ns / _NS_PER_MS:.2f} ms",
            f"{point.balance.break_even_copy_ns / _NS_PER_MS:.1f} ms",
            f"{point.balance.speedup:.2f}",
        )
        for point in points
    ]
    return _table(header, rows)


def _beam_width_table(points: Sequence[BeamWidthPoint]) -> str:
    header = (
        "beam width",
        "saved",
        "copied blocks per step of a request",
        "requests that fit",
        "without sharing",
        "copies of a full step",
        "may cost",
        "histories, without sharing",
        "speed with sharing / without",
    )
    rows = [
        (
            str(point.width),
            f"{100 * point.sharing.saved_share:.1f} %",
            f"{point.sharing.num_copies_per_step:.2f}",
            f"{point.balance.num_groups_shared:.1f}",
            f"{point.balance.num_groups_unshared:.1f}",
            f"{point.balance.copy_ns / _NS_PER_MS:.2f} ms",
            f"{point.balance.break_even_copy_ns / _NS_PER_MS:.1f} ms",
            f"{point.balance.history_copy_ns / _NS_PER_MS:.1f} ms",
            f"{point.balance.speedup:.2f}",
        )
        for point in points
    ]
    return _table(header, rows)


def _break_even_sentence(points: Sequence[BeamWidthPoint]) -> str:
    losing = [point.width for point in points if point.balance.speedup < 1]
    if losing:
        return f"Copying costs more than sharing saves from a width of {losing[0]} on."
    shares = [point.balance.copy_ns / point.balance.break_even_copy_ns for point in points]
    worst = max(range(len(points)), key=shares.__getitem__)
    return (
        f"Copying never costs as much as sharing saves: at worst {100 * shares[worst]:.1f} % of "
        f"it, at a width of {points[worst].width}."
    )


def _value(claim: Claim, value: float) -> str:
    if math.isnan(value):
        return "–"
    if claim.claim.startswith(_PERCENT_WORDS):
        return f"{100 * value:.1f} %"
    return f"{value:.2f}"


def _plain(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
