"""What rounds of the tracing bench say, on literal turns."""

from bench.tracing_cost import ALL, OFF, Turn, judge


def _round(off: float, with_all: float) -> dict[str, Turn]:
    return {
        OFF: Turn(OFF, off, {"executor": 0.5}, 1000),
        ALL: Turn(ALL, with_all, {"executor": 0.75, "telemetry": 0.25}, 1000),
    }


def test_ratios_are_of_the_turns_of_one_round():
    # The machine became ten times slower; each round by itself says 0.98.
    verdict = judge([_round(1000.0, 980.0), _round(100.0, 98.0), _round(1000.0, 980.0)])
    assert verdict.ratios == [0.98, 0.98, 0.98]
    assert (verdict.ratio_low, verdict.ratio, verdict.ratio_high) == (0.98, 0.98, 0.98)
    assert verdict.tokens_per_s == {OFF: 1000.0, ALL: 980.0}


def test_one_bad_round_does_not_move_the_median():
    verdict = judge([_round(100.0, 99.0), _round(100.0, 10.0), _round(100.0, 101.0)])
    assert verdict.ratio == 0.99
    assert verdict.ratio_low < 0.6


def test_processor_time_is_told_for_each_process_and_token():
    verdict = judge([_round(1.0, 1.0), _round(1.0, 1.0)])
    assert verdict.cpu_us_per_token == {
        OFF: {"executor": 500.0},
        ALL: {"executor": 750.0, "telemetry": 250.0},
    }


def test_processor_time_of_all_processes_is_compared_round_by_round():
    def round_of(off_s: float, all_s: float, exporter_s: float) -> dict[str, Turn]:
        return {
            OFF: Turn(OFF, 1.0, {"executor": off_s}, 1000),
            ALL: Turn(ALL, 1.0, {"executor": all_s, "telemetry": exporter_s}, 1000),
        }

    # In the last round the machine was ten times slower for both.
    verdict = judge([round_of(1.0, 1.0, 0.1), round_of(1.0, 1.0, 0.3), round_of(10.0, 10.0, 1.0)])
    assert verdict.cpu_ratio == 1.1
    assert verdict.cpu_us_per_token[ALL]["telemetry"] == 300.0
