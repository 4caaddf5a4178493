"""What became of a comparison: a row per workload and engine."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from bench.engines.worker_process import Measurement
from bench.engines.workloads import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One engine at one workload; figures are medians over the repetitions.

    Attributes:
        workload: Its letter.
        engine: Its name.
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
    engine: str,
    workload: Workload,
    turns: Sequence[Measurement],
    first_tokens: Sequence[Measurement],
) -> Row:
    """The row of one engine; ``first_tokens`` is empty for workloads of many requests."""
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
        engine=engine,
        output_tokens_per_s=workload.num_output_tokens / statistics.median(walls_s),
        walls_s=walls_s,
        first_token_ms=first_token_ms,
        token_ms=token_ms,
        num_wrong=sum(turn.num_wrong for turn in [*turns, *first_tokens]),
        own_cores=statistics.median(turn.own_cores for turn in turns),
        other_cores=max(turn.other_cores for turn in turns),
    )


def as_table(rows: Sequence[Row]) -> str:
    """Markdown: output tokens per second, and behind it the ratio to the best peer of the row.

    Rows of Pageframe come first among the engines, and are no peers of themselves.
    """
    lines = [
        "| workload | engine | output tokens/s | best peer | first token, ms | ms/token |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        peers = [
            other.output_tokens_per_s
            for other in rows
            if other.workload == row.workload and not is_ours(other.engine)
        ]
        ratio = f"{row.output_tokens_per_s / max(peers):.2f}" if peers else "-"
        figures = [row.first_token_ms, row.token_ms]
        single = ["-" if figure is None else f"{figure:.2f}" for figure in figures]
        lines.append(
            f"| {row.workload} | {row.engine} | {row.output_tokens_per_s:.0f} | {ratio} | "
            f"{single[0]} | {single[1]} |"
        )
    return "\n".join(lines)


def is_ours(engine: str) -> bool:
    """Whether an engine is no peer."""
    return engine.startswith("pageframe")
