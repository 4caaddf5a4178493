"""What became of a comparison: a row per workload and engine."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from bench.engines.worker_process import Measurement, Peer
from bench.engines.workloads import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One engine at one workload; figures are medians over the repetitions.

    Attributes:
        workload: Its letter.
        engine: Its name.
        is_served: Whether it computes in other processes than the one that asks it.
        output_tokens_per_s: Tokens made, over the time from first to last.
        walls_s: All repetitions.
        first_token_ms: Of a lone request; None for workloads of many.
        token_ms: Each further token of it; None likewise.
        num_wrong: Samples of a wrong length, over all repetitions.
        own_cores: Processors that the engine kept busy.
        other_cores: The same of everything else, the worst repetition.
    """

    workload: str
    engine: str
    is_served: bool
    output_tokens_per_s: float
    walls_s: list[float]
    first_token_ms: float | None
    token_ms: float | None
    num_wrong: int
    own_cores: float
    other_cores: float

    def to_json(self) -> dict[str, object]:
        """For machines."""
        return asdict(self)


def summarise(
    peer: Peer,
    workload: Workload,
    turns: Sequence[Measurement],
    first_tokens: Sequence[Measurement],
) -> Row:
    """The row of an engine; ``first_tokens`` is empty for workloads of many requests."""
    walls_s = [turn.wall_s for turn in turns]
    first_token_ms = token_ms = None
    if first_tokens:
        firsts_s = [turn.wall_s for turn in first_tokens]
        num_more = workload.num_output_tokens - 1
        first_token_ms = 1e3 * statistics.median(firsts_s)
        token_ms = statistics.median(
            1e3 * (wall_s - first_s) / num_more
            for wall_s, first_s in zip(walls_s, firsts_s, strict=True)
        )
    return Row(
        workload=workload.name,
        engine=peer.name,
        is_served=peer.is_served,
        output_tokens_per_s=workload.num_output_tokens / statistics.median(walls_s),
        walls_s=walls_s,
        first_token_ms=first_token_ms,
        token_ms=token_ms,
        num_wrong=sum(turn.num_wrong for turn in [*turns, *first_tokens]),
        own_cores=statistics.median(turn.own_cores for turn in turns),
        other_cores=max(turn.other_cores for turn in turns),
    )


def as_table(rows: Sequence[Row]) -> str:
    """Markdown: output tokens per second, and behind it the ratio to the best of `rivals`."""
    lines = [
        "| workload | engine | output tokens/s | best peer | first token, ms | ms/token |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        others = {other.engine: other for other in rows if other.workload == row.workload}
        names = rivals(row.engine, {name: other.is_served for name, other in others.items()})
        peers = [others[name].output_tokens_per_s for name in names]
        ratio = f"{row.output_tokens_per_s / max(peers):.2f}" if peers else "-"
        figures = [row.first_token_ms, row.token_ms]
        single = ["-" if figure is None else f"{figure:.2f}" for figure in figures]
        lines.append(
            f"| {row.workload} | {row.engine} | {row.output_tokens_per_s:.0f} | {ratio} | "
            f"{single[0]} | {single[1]} |"
        )
    return "\n".join(lines)


def rivals(engine: str, is_served: Mapping[str, bool]) -> list[str]:
    """Peers that an engine is compared with.

    One that is served is compared with what is served too, where there is any such peer; else, and
    one that computes where it is asked, with all.

    Args:
        engine: Who is compared.
        is_served: Of each engine that was measured.
    """
    peers = [name for name in is_served if not is_ours(name)]
    alike = [name for name in peers if is_served[name]]
    return alike if is_served[engine] and alike else peers


def is_ours(engine: str) -> bool:
    """Whether an engine is no peer."""
    return engine.startswith("pageframe")
