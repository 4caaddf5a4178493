"""Reproduce the paper's memory tables: ``python -m bench.paper``.

Exit code 1 when a claim is missed.
"""

import argparse
from pathlib import Path

from bench.paper.figures import draw_all
from bench.paper.report import claim_line, write_results
from bench.paper.study import Effort, run_study
from bench.paper.verdict import all_claims

_RESULTS = Path(__file__).resolve().parents[1] / "results"


def main() -> int:
    """Measure, write, draw, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=_RESULTS, help="folder for the results")
    folder: Path = parser.parse_args().output
    results = run_study(Effort())
    claims = all_claims(results)
    write_results(results, claims, folder)
    draw_all(results, folder)
    print(f"{'':>4}  {'claim':<78} {'paper':>8} {'ours':>8}")
    for claim in claims:
        print(claim_line(claim))
    missed = [claim for claim in claims if claim.has_passed is False]
    print(f"{len(missed)} claims missed; written to {folder}")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
