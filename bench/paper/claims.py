"""What the paper says, what we find, and whether that bears it out.

Rules, the same for all claims of a kind:

    ratio          at least the paper's
    our share      at least the paper's, less three percentage points
    baseline       within five percentage points, or 15 % of its batch: a baseline that is weaker
                   than the paper's would flatter us
    remark         not judged; it stands beside for comparison
"""

import enum
import math
from dataclasses import dataclass

POINTS_BELOW = 0.03
POINTS_BASELINE = 0.05
PART_BASELINE = 0.15


@enum.unique
class Rule(enum.Enum):
    """How a claim is judged."""

    RATIO = "at least the paper's"
    SHARE = "at least the paper's less 3 points"
    BASELINE_SHARE = "within 5 points of the paper's"
    BASELINE_COUNT = "within 15 % of the paper's"
    REMARK = "not judged"


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One figure of the paper beside ours.

    Attributes:
        claim: What it is, with its unit.
        source: Where the paper has it.
        paper: Its value there; NaN when the paper has none.
        ours: Ours.
        rule: How it is judged.
        note: Why it differs, where it does.
    """

    claim: str
    source: str
    paper: float
    ours: float
    rule: Rule
    note: str = ""

    @property
    def has_passed(self) -> bool | None:
        """Whether ours bears the paper's out; None for a remark."""
        if self.rule is Rule.REMARK:
            return None
        if math.isnan(self.ours):
            return False
        if self.rule is Rule.RATIO:
            return self.ours >= self.paper
        if self.rule is Rule.SHARE:
            return self.ours >= self.paper - POINTS_BELOW
        if self.rule is Rule.BASELINE_SHARE:
            return abs(self.ours - self.paper) <= POINTS_BASELINE
        return abs(self.ours / self.paper - 1) <= PART_BASELINE

    def to_json(self) -> dict[str, object]:
        """For the results file; a value that does not exist is null."""
        return {
            "claim": self.claim,
            "source": self.source,
            "paper": _number(self.paper),
            "ours": _number(self.ours),
            "pass": self.has_passed,
            "rule": self.rule.value,
            "note": self.note,
        }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.6g}")
