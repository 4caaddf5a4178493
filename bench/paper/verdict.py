"""The claims of the paper, filled in with what was found."""

import math

from bench.paper.claims import Claim, Rule
from bench.paper.lengths import Lengths
from bench.paper.occupancy import Occupancy
from bench.paper.orca import Reservation
from bench.paper.rates import Curve, smallest_ratio
from bench.paper.sharing import Sharing
from bench.paper.study import Results
from bench.paper.systems import PAGEFRAME

_MAX, _POW2, _ORACLE = (reservation.value for reservation in Reservation)

# Figure 2.
_TOKEN_SHARES = {_MAX: 0.204, _POW2: 0.268, _ORACLE: 0.382, PAGEFRAME: 0.963}
# Figure 13, by data set.
_NUM_RUNNING = {_MAX: 7.00, _POW2: 9.81, _ORACLE: 13.62, PAGEFRAME: 30.42}
_NUM_RUNNING_ALPACA = {_MAX: 7.00, _POW2: 43.24, _ORACLE: 72.75, PAGEFRAME: 132.44}
# Section 6.2.
_BATCH_RATIOS = {_MAX: 4.3, _ORACLE: 2.2}
_RATE_RATIOS = {_MAX: 2.7, _ORACLE: 1.7}
# Section 6.3: the ends of its ranges belong to 2 and to 6 sequences (figure 15).
_PARALLEL = {"ShareGPT": {2: 0.162, 6: 0.305}, "Alpaca": {2: 0.061, 6: 0.098}}
_BEAMS = {"ShareGPT": {2: 0.443, 6: 0.663}, "Alpaca": {2: 0.376, 6: 0.552}}

_NOTE_BATCH = "memory always full; requests wait"
_NOTE_SHORTER = (
    "the running requests are shorter than the paper's (its spread of lengths is not published)"
)
_NOTE_PLAIN = "unweighted lengths, which are shorter than the paper's"
_NOTE_BEAMS = "how soon beams meet depends on the model; ours were recorded from the embedded one"
_NOTE_SYNTHETIC = "synthetic lengths with Alpaca's means"


def all_claims(results: Results) -> list[Claim]:
    """Every claim, judged ones and remarks, in the order of the paper."""
    lengths = results.lengths
    matched, _, alpaca = lengths
    return [
        *_memory_claims(results.occupancy[matched.name]),
        *_batch_claims(results.occupancy[matched.name]),
        *_batch_remarks(results, alpaca),
        *_rate_claims(results.curves, Rule.RATIO, "at equal latency"),
        *_rate_claims(results.roofline_curves, Rule.REMARK, "at equal latency, perfect device"),
        *_sharing_claims(results.parallel, "parallel sampling", _PARALLEL, lengths),
        *_sharing_claims(results.beams, "beam search", _BEAMS, lengths, _NOTE_BEAMS),
    ]


def _memory_claims(systems: list[Occupancy]) -> list[Claim]:
    claims = []
    for occupancy in systems:
        is_ours = occupancy.system == PAGEFRAME
        claims.append(
            Claim(
                claim=f"share of KV memory that holds tokens, {occupancy.system}",
                source="figure 2",
                paper=_TOKEN_SHARES[occupancy.system],
                ours=occupancy.token_share,
                rule=Rule.SHARE if is_ours else Rule.BASELINE_SHARE,
                note="" if is_ours or occupancy.system == _ORACLE else _NOTE_SHORTER,
            )
        )
    ours = systems[-1]
    claims.append(
        Claim(
            claim="share of the blocks given out that holds tokens, Pageframe",
            source="section 1",
            paper=_TOKEN_SHARES[PAGEFRAME],
            ours=ours.token_share_of_held,
            rule=Rule.SHARE,
            note="the rest of memory is kept free for those who run, or too little for the next",
        )
    )
    return claims


def _batch_claims(systems: list[Occupancy]) -> list[Claim]:
    num_running = {occupancy.system: occupancy.num_running for occupancy in systems}
    counts = [
        Claim(
            claim=f"mean number of batched requests, ShareGPT, {name}",
            source="figure 13a",
            paper=_NUM_RUNNING[name],
            ours=number,
            rule=Rule.REMARK if name == PAGEFRAME else Rule.BASELINE_COUNT,
            note=_NOTE_BATCH,
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
        )
        for name, paper in _BATCH_RATIOS.items()
    ]
    return counts + ratios


def _batch_remarks(results: Results, alpaca: Lengths) -> list[Claim]:
    at_paper_rate = {
        name: point.num_running
        for name, curve in results.curves.items()
        for point in curve.points
        if point.rate_per_s == 2
    }
    remarks = [
        Claim(
            claim=f"mean number of batched requests, ShareGPT at 2 requests/s, {name}",
            source="figure 13a",
            paper=_NUM_RUNNING[name],
            ours=at_paper_rate.get(name, math.nan),
            rule=Rule.REMARK,
            note="depends on the cost model; not run where the queue grows without end",
        )
        for name in _NUM_RUNNING
    ]
    for title, systems, note in (
        ("Alpaca-like", results.occupancy[alpaca.name], _NOTE_BATCH),
        ("Alpaca-like at 30 requests/s", results.alpaca_at_rate, "depends on the cost model"),
    ):
        remarks += [
            Claim(
                claim=f"mean number of batched requests, {title}, {occupancy.system}",
                source="figure 13b",
                paper=_NUM_RUNNING_ALPACA[occupancy.system],
                ours=occupancy.num_running,
                rule=Rule.REMARK,
                note=f"{_NOTE_SYNTHETIC}; {note}",
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
            note="smallest of the ratios at 0.1, 0.2, 0.5 and 1 s per token",
        )
        for name, paper in _RATE_RATIOS.items()
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
