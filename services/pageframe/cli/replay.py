"""``pageframe replay``: does this version decide as it was recorded, and what if not."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pageframe.cli.console import Console, open_console
from pageframe.cli.exit_codes import EXIT_FAILURE
from pageframe.cli.simulate import (
    ItlOption,
    JsonOption,
    PlotOption,
    PolicyOption,
    SettingOption,
    TtftOption,
    parse_objectives,
    parse_policies,
    parse_settings,
    run_and_show,
)
from pageframe.core.errors import InvalidRequestError
from pageframe.lab.replay import ReplayReport
from pageframe.lab.replay import replay as replay_entries
from pageframe.lab.replay_arrivals import read_workload
from pageframe.lab.simulate import recorded_config
from pageframe.wire.journal import JournalReader

_NUM_LINES_SHOWN = 40
_PROGRESS_EVERY_RECORDS = 500


def replay(
    file: Annotated[Path, typer.Argument(help="What `pageframe up --record FILE` wrote.")],
    policy: PolicyOption = None,
    setting: SettingOption = None,
    memory: Annotated[
        bool, typer.Option(help="Replay KV memory too, and compare its results.")
    ] = True,
    slo_ttft: TtftOption = "2s",
    slo_itl: ItlOption = "100ms",
    plot: PlotOption = None,
    as_json: JsonOption = False,
) -> None:
    """Feed a recorded run to a fresh scheduler and compare every decision.

    Ends with 0 if all are the same, else with 1 after showing the first difference. With --policy
    the recorded arrivals are served in virtual time under the recorded policy and under others.
    """
    objectives = parse_objectives(slo_ttft, slo_itl)
    console = open_console()
    if policy:
        with console, _open(file) as stream:
            reader = JournalReader(stream)
            workload = read_workload(reader)
            _warn_of_cut(console, reader)
        policies = [
            recorded_config(it, parse_settings(setting), workload.header, workload.cost)
            for it in [None, *parse_policies(policy)]
        ]
        run_and_show(policies, workload.arrivals, objectives, plot=plot, as_json=as_json)
        return
    with console, _open(file) as stream:
        num_bytes = max(1, file.stat().st_size)
        reader = JournalReader(stream)

        def show(num_records: int) -> None:
            if num_records % _PROGRESS_EVERY_RECORDS == 0:
                console.progress(file.name, "replaying", min(0.999, stream.tell() / num_bytes))

        report = replay_entries(reader, compares_memory=memory, on_entry=show)
        console.progress(file.name, "replayed", 1.0)
        _warn_of_cut(console, reader)
    if as_json:
        print(json.dumps(_to_json(report)))
    else:
        _print(report)
    if not report.is_same:
        raise typer.Exit(EXIT_FAILURE)


def _open(file: Path) -> Any:
    try:
        return file.open("rb")
    except OSError as error:
        raise InvalidRequestError(
            "JOURNAL_UNREADABLE", f"cannot read {file}: {error.strerror}"
        ) from None


def _warn_of_cut(console: Console, reader: JournalReader) -> None:
    if reader.num_bytes_cut:
        console.say(
            f"the journal was cut off: its last {reader.num_bytes_cut} bytes are no whole record; "
            f"{reader.num_records} records before them were read"
        )


def _print(report: ReplayReport) -> None:
    print(f"{report.num_steps_same} of {report.num_steps} steps the same")
    if report.memory_stopped:
        print(
            f"KV memory: {report.num_results_same} of {report.num_results} results the same; "
            f"not compared further: {report.memory_stopped}"
        )
    elif report.num_results:
        print(f"KV memory: {report.num_results_same} of {report.num_results} results the same")
    difference = report.difference
    if difference is None:
        return
    print(
        f"first difference: {difference.what}, record {difference.record}, step {difference.step}"
    )
    lines = difference.lines()
    print("\n".join(lines[:_NUM_LINES_SHOWN]))
    if len(lines) > _NUM_LINES_SHOWN:
        print(f"({len(lines) - _NUM_LINES_SHOWN} more lines; --json has all)")


def _to_json(report: ReplayReport) -> dict[str, Any]:
    difference = report.difference
    return {
        "is_same": report.is_same,
        "num_records": report.num_records,
        "num_requests": report.num_requests,
        "num_steps": report.num_steps,
        "num_steps_same": report.num_steps_same,
        "num_results": report.num_results,
        "num_results_same": report.num_results_same,
        "memory_stopped": report.memory_stopped,
        "difference": None
        if difference is None
        else {
            "record": difference.record,
            "step": difference.step,
            "what": difference.what,
            "recorded": difference.recorded,
            "replayed": difference.replayed,
        },
    }
