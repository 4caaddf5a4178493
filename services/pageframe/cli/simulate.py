"""``pageframe simulate``: what a policy would have done, without a GPU and without waiting."""

from pathlib import Path
from typing import Annotated

import typer

from pageframe.cli.console import open_console
from pageframe.cli.simulate_view import outcomes_to_json, print_outcomes
from pageframe.config.values import parse_duration_seconds
from pageframe.core.errors import InvalidRequestError
from pageframe.lab.simulate import Policy, compare, configure, parse_policy
from pageframe.lab.simulate_arrivals import (
    Arrival,
    poisson_arrivals,
    read_arrivals,
    share_prefixes,
    sharegpt_arrivals,
)
from pageframe.lab.simulate_cost import parse_cost
from pageframe.lab.simulate_figures import Objectives
from pageframe.lab.simulate_plots import draw
from pageframe.lab.virtual import VirtualConfig

PolicyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        help="[NAME:]PART,...: settings KEY=VALUE of the scheduler, or names of policies such as "
        "fcfs, youngest, swap. Give it several times to compare.",
    ),
]
SettingOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="KEY=VALUE: a setting of `pageframe up` for every policy."),
]
TtftOption = Annotated[str, typer.Option("--slo-ttft", help="Good: first token within this time.")]
ItlOption = Annotated[
    str, typer.Option("--slo-itl", help="Good: 99 % of times between tokens within this time.")
]
PlotOption = Annotated[Path | None, typer.Option("--plot", help="Draw plots into this PNG file.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def simulate(
    arrivals: Annotated[
        str,
        typer.Option(
            help="sharegpt (lengths of real first turns), poisson (log-normal lengths), or a file "
            "of JSON lines; docs/simulation.md has its fields."
        ),
    ] = "sharegpt",
    rate: Annotated[float, typer.Option(min=1e-6, help="Requests per second.")] = 10.0,
    num_requests: Annotated[int, typer.Option(min=1, help="How many come.")] = 1000,
    mean_prompt_tokens: Annotated[int, typer.Option(min=1, help="Of poisson.")] = 500,
    mean_output_tokens: Annotated[int, typer.Option(min=1, help="Of poisson.")] = 200,
    num_prefixes: Annotated[
        int, typer.Option(min=0, help="Put one of so many system prompts before each prompt.")
    ] = 0,
    num_prefix_tokens: Annotated[int, typer.Option(min=1, help="Tokens of those.")] = 500,
    policy: PolicyOption = None,
    setting: SettingOption = None,
    cost: Annotated[
        str,
        typer.Option(
            help="What steps cost: h200-8b, or terms such as base=2ms,decode=10us,context=40ns,"
            "prefill=25us,pair=2ns,move=50us."
        ),
    ] = "h200-8b",
    slo_ttft: TtftOption = "2s",
    slo_itl: ItlOption = "100ms",
    seed: Annotated[int, typer.Option(help="Of random arrivals.")] = 0,
    plot: PlotOption = None,
    as_json: JsonOption = False,
) -> None:
    """Serve a workload in virtual time, by the real scheduler and KV memory, and compare policies.

    Nothing is computed; a step lasts what a formula says.
    """
    if arrivals == "sharegpt":
        who = sharegpt_arrivals(num_requests, rate, seed=seed)
    elif arrivals == "poisson":
        who = poisson_arrivals(
            num_requests,
            rate,
            mean_prompt_tokens=mean_prompt_tokens,
            mean_output_tokens=mean_output_tokens,
            seed=seed,
        )
    else:
        who = read_arrivals(Path(arrivals))
    if num_prefixes:
        who = share_prefixes(who, num_prefixes, num_prefix_tokens, seed=seed)
    device = parse_cost(cost)
    base = parse_settings(setting)
    policies = [(it, configure(it, base, device)) for it in parse_policies(policy)]
    run_and_show(policies, who, parse_objectives(slo_ttft, slo_itl), plot=plot, as_json=as_json)


def run_and_show(
    policies: list[tuple[Policy, VirtualConfig]],
    arrivals: list[Arrival],
    objectives: Objectives,
    *,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Serve the arrivals under each policy and print the comparison."""
    console = open_console()
    with console:
        outcomes = compare(
            policies,
            arrivals,
            objectives,
            on_progress=lambda name, share: console.progress(name, "simulating", share),
        )
        if plot is not None:
            draw(outcomes, plot)
            console.say(f"plots are in {plot}")
    if as_json:
        print(outcomes_to_json(outcomes, objectives))
    else:
        print_outcomes(outcomes, objectives)


def parse_policies(texts: list[str] | None) -> list[Policy]:
    """Policies as given; the default one when none is."""
    return [parse_policy(text) for text in texts or [""]]


def parse_settings(texts: list[str] | None) -> dict[str, str]:
    """Settings of ``--set``; what they are worth is checked with those of each policy.

    Raises:
        InvalidRequestError: SETTING_MALFORMED.
    """
    settings = {}
    for text in texts or []:
        key, separator, value = text.partition("=")
        if not separator:
            raise InvalidRequestError("SETTING_MALFORMED", f"--set {text!r} must be KEY=VALUE")
        settings[key.strip().replace("_", "-")] = value.strip()
    return settings


def parse_objectives(ttft: str, itl: str) -> Objectives:
    """Objectives from two durations.

    Raises:
        InvalidRequestError: DURATION_MALFORMED.
    """
    try:
        return Objectives(ttft_s=parse_duration_seconds(ttft), itl_s=parse_duration_seconds(itl))
    except ValueError as error:
        raise InvalidRequestError(
            "DURATION_MALFORMED", f"--slo-ttft {ttft!r} or --slo-itl {itl!r} {error}"
        ) from None
