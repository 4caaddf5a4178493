"""The claims of the paper, filled in with what was found."""

import math

from bench.paper.claims import Claim, Rule
from bench.paper.lengths import Lengths
from bench.paper.occupancy import Occupancy
from bench.paper.published import (
    BATCH_RATIOS,
    BEAM_SAVINGS,
    NUM_RUNNING,
    NUM_RUNNING_ALPACA,
    PARALLEL_SAVINGS,
    RATE_RATIOS,
    TOKEN_SHARES,
)
from bench.paper.rates import Curve, smallest_ratio
from bench.paper.sharing import Sharing
from bench.paper.study import Results
from bench.paper.systems import PAGEFRAME

_NOTE_BATCH = "memory always full"
_NOTE_COST = "whether memory is full at this rate depends on the cost model"
_NOTE_SPREAD = (
    "mean lengths are the paper's, their spread is not published; our running requests are shorter"
)
_NOTE_HEADROOM = (
    "1 % is kept free for those who run, and after a preemption only those come in who fit to "
    "their end"
)
_NOTE_HELD = "waste is in the last block of each sequence only"
_NOTE_RATE = (
    "smallest of the ratios at 0.1, 0.2 and 0.5 s per token; in a simulator, so it depends on "
    "the cost model"
)
_NOTE_PLAIN = "lengths as they are, which are shorter than the paper's"
_NOTE_BEAMS = "how soon beams meet depends on the model; ours were recorded from the embedded one"
_NOTE_SYNTHETIC = "synthetic lengths with Alpaca's means"


def all_claims(results: Results) -> list[Claim]:
    """Every claim, judged ones and remarks, in the order of the paper."""
    lengths = results.lengths
    matched, _, _ = lengths
    return [
        *_memory_claims(results.occupancy[matched.name]),
        *_batch_claims(results.occupancy[matched.name]),
        *_batch_remarks(results),
        *_rate_claims(results.curves, Rule.RATIO, "at equal latency"),
        *_rate_claims(results.roofline_curves, Rule.REMARK, "at equal latency, perfect device"),
        *_sharing_claims(
            results.parallel, "parallel sampling", PARALLEL_SAVINGS, lengths, _NOTE_SPREAD
        ),
        *_sharing_claims(results.beams, "beam search", BEAM_SAVINGS, lengths, _NOTE_BEAMS),
    ]


def _memory_claims(systems: list[Occupancy]) -> list[Claim]:
    claims = []
    for occupancy in systems:
        is_ours = occupancy.system == PAGEFRAME
        claims.append(
            Claim(
                claim=f"share of KV memory that holds tokens, {occupancy.system}",
                source="figure 2",
                paper=TOKEN_SHARES[occupancy.system],
                ours=occupancy.token_share,
                rule=Rule.SHARE if is_ours else Rule.BASELINE_SHARE,
                note=_NOTE_HEADROOM if is_ours else _NOTE_SPREAD,
            )
        )
    ours = next(occupancy for occupancy in systems if occupancy.system == PAGEFRAME)
    claims.append(
        Claim(
            claim="share of the blocks given out that holds tokens, Pageframe",
            source="figure 2",
            paper=TOKEN_SHARES[PAGEFRAME],
            ours=ours.token_share_of_held,
            rule=Rule.SHARE,
            note=_NOTE_HELD,
        )
    )
    return claims


def _batch_claims(systems: list[Occupancy]) -> list[Claim]:
    num_running = {occupancy.system: occupancy.num_running for occupancy in systems}
    counts = [
        Claim(
            claim=f"mean number of batched requests, ShareGPT, {name}",
            source="figure 13a",
            paper=NUM_RUNNING[name],
            ours=number,
            rule=Rule.REMARK if name == PAGEFRAME else Rule.BASELINE_COUNT,
            note=f"{_NOTE_BATCH}; {_NOTE_SPREAD}",
        )
        for name, number in num_running.items()
    ]
    ratios = [
        Claim(
            claim=f"batched requests at equal memory, ShareGPT, Pageframe over {name}",
            source="section 6.2",
            paper=paper,
            ours=num_running[PAGEFRAME] / num_running[name],
            rule=Rule.RATIO,
            note=_NOTE_BATCH,
        )
        for name, paper in BATCH_RATIOS.items()
    ]
    return counts + ratios


def _batch_remarks(results: Results) -> list[Claim]:
    _, _, alpaca = results.lengths
    remarks = []
    for title, systems, paper, source, note in (
        (
            "ShareGPT at 2 requests/s",
            results.sharegpt_at_rate,
            NUM_RUNNING,
            "figure 13a",
            _NOTE_COST,
        ),
        (
            alpaca.name,
            results.occupancy[alpaca.name],
            NUM_RUNNING_ALPACA,
            "figure 13b",
            f"{_NOTE_SYNTHETIC}; {_NOTE_BATCH}",
        ),
        (
            f"{alpaca.name} at 30 requests/s",
            results.alpaca_at_rate,
            NUM_RUNNING_ALPACA,
            "figure 13b",
            f"{_NOTE_SYNTHETIC}; {_NOTE_COST}",
        ),
    ):
        remarks += [
            Claim(
                claim=f"mean number of batched requests, {title}, {occupancy.system}",
                source=source,
                paper=paper[occupancy.system],
                ours=occupancy.num_running,
                rule=Rule.REMARK,
                note=note,
            )
            for occupancy in systems
        ]
    return remarks


def _rate_claims(curves: dict[str, Curve], rule: Rule, title: str) -> list[Claim]:
    return [
        Claim(
            claim=f"request rate {title}, ShareGPT, Pageframe over {name}",
            source="section 6.2, figure 12",
            paper=paper,
            ours=smallest_ratio(curves, name),
            rule=rule,
            note=_NOTE_RATE,
        )
        for name, paper in RATE_RATIOS.items()
    ]


def _sharing_claims(
    measured: list[Sharing],
    kind: str,
    paper: dict[str, dict[int, float]],
    lengths: list[Lengths],
    *notes: str,
) -> list[Claim]:
    matched, plain, alpaca = lengths
    kinds = {
        matched.name: ("ShareGPT", Rule.SHARE, notes),
        plain.name: ("ShareGPT", Rule.REMARK, (_NOTE_PLAIN, *notes)),
        alpaca.name: ("Alpaca", Rule.SHARE, (_NOTE_SYNTHETIC, *notes)),
    }
    claims = []
    for sharing in measured:
        name, rule, all_notes = kinds[sharing.data]
        value = paper[name].get(sharing.num_sequences, math.nan)
        claims.append(
            Claim(
                claim=f"blocks saved by sharing, {kind} of {sharing.num_sequences}, {sharing.data}",
                source="section 6.3" if name == "ShareGPT" else "section 6.3, figure 15",
                paper=value,
                ours=sharing.saved_share,
                rule=Rule.REMARK if math.isnan(value) else rule,
                note="; ".join(all_notes),
            )
        )
    return claims
