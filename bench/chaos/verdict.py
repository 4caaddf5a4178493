"""What came out of a chaos run, and whether it is well."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

SERVED_WITHIN_S = 5.0


@dataclass(slots=True, kw_only=True)
class Kill:
    """One round.

    Attributes:
        kind: Which service died.
        serving_after_s: Until a request that was sent after the kill had its first token.
        loading_s: How much of that the executor took to be there; 0 for the others.
        num_under_way: Streams that had begun and not ended when it died.
    """

    kind: str
    serving_after_s: float
    loading_s: float
    num_under_way: int

    @property
    def beyond_loading_s(self) -> float:
        """Until it served again, without the loading of the model."""
        return self.serving_after_s - self.loading_s


@dataclass(slots=True, kw_only=True)
class Verdict:
    """What came out.

    Attributes:
        seed: Of the choices.
        kills: Rounds.
        num_requests: Requests that ended.
        wrong: Requests whose tokens were not those of the undisturbed run.
        failed: Requests that ended with an error.
        is_at_rest: Whether every block was free or cached at the end.
    """

    seed: int
    kills: list[Kill] = field(default_factory=list)
    num_requests: int = 0
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    is_at_rest: bool = False

    @property
    def is_well(self) -> bool:
        """Whether everything is as it has to be."""
        return (
            not self.wrong
            and not self.failed
            and self.is_at_rest
            and all(kill.beyond_loading_s <= SERVED_WITHIN_S for kill in self.kills)
        )

    def worst(self, kind: str) -> Kill | None:
        """The round of a kind that took longest, loading left out."""
        kills = [kill for kill in self.kills if kill.kind == kind]
        return max(kills, key=lambda kill: kill.beyond_loading_s, default=None)


def report(verdict: Verdict) -> Iterator[str]:
    """What came out, in lines."""
    counts = Counter(kill.kind for kill in verdict.kills)
    yield f"seed {verdict.seed}: {len(verdict.kills)} kills, {verdict.num_requests} requests ended"
    for kind, count in sorted(counts.items()):
        worst = verdict.worst(kind)
        assert worst is not None, "there is one"
        yield (
            f"  {kind}: {count} times; worst {worst.serving_after_s:.2f} s until it served again, "
            f"of which {worst.loading_s:.2f} s were loading; {worst.num_under_way} under way"
        )
    yield f"  wrong tokens: {len(verdict.wrong)}; failed: {len(verdict.failed)}"
    yield from (f"    {line}" for line in (verdict.wrong + verdict.failed)[:10])
    yield f"  all blocks free or cached at the end: {'yes' if verdict.is_at_rest else 'NO'}"
    yield f"verdict: {'well' if verdict.is_well else 'NOT WELL'}"
