"""``pageframe generate``: one prompt, or many lines of them, through a running server."""

import asyncio
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from pageframe.cli.api_key import ApiKeyFile, read_api_key
from pageframe.cli.exit_codes import EXIT_FAILURE, EXIT_OK
from pageframe.cli.generation_json import error_to_json, request_from_line, result_to_json
from pageframe.cli.server_address import explained, find_server
from pageframe.cli.server_tls import TlsOption, find_tls
from pageframe.client import (
    AsyncPageframeClient,
    BeamParams,
    ClientTls,
    Delta,
    EarlyStopping,
    Event,
    GenerationRequest,
    Grammar,
    GrammarForm,
    Message,
    PageframeClient,
    collect,
)
from pageframe.core.errors import PageframeError
from pageframe.core.limits import LIMITS
from pageframe.core.request import Delivery

# How long a server may be away before a command gives up.
_RETRY_FOR_S = 5.0
# A server takes no more at once from one gateway.
_NUM_CONCURRENT_MAX = LIMITS.num_requests_per_gateway_max // 2


_BestOf = Annotated[int | None, typer.Option(help="Sample this many, print the --n most probable.")]
_Beams = Annotated[
    int | None, typer.Option(help="Beam search of this width; prints the --n best outputs.")
]
_LengthPenalty = Annotated[
    float, typer.Option(help="With --beams: above 0 favours long outputs, below 0 short ones.")
]
_EarlyStopping = Annotated[str, typer.Option(help="With --beams: heuristic, always or never.")]
_JsonSchema = Annotated[
    Path | None, typer.Option(help="File with a JSON Schema that the output has to follow.")
]
_Session = Annotated[
    str, typer.Option(help="Name of a chat; its blocks are kept for the next turn.")
]
_PrefixHandle = Annotated[
    str, typer.Option(help="Name of a retained prefix that the prompt begins with.")
]


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="Text to continue; - reads it from standard input.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of output.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the best token.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep this much probability.")] = None,
    top_k: Annotated[int, typer.Option(help="Keep this many tokens; 0 keeps all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Least share of the best probability.")] = 0.0,
    n: Annotated[int, typer.Option("--n", help="Outputs of the same prompt.")] = 1,
    best_of: _BestOf = None,
    beams: _Beams = None,
    length_penalty: _LengthPenalty = 1.0,
    early_stopping: _EarlyStopping = "heuristic",
    seed: Annotated[int | None, typer.Option(help="Same seed, same tokens.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop string; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end.")] = False,
    logprobs: Annotated[int | None, typer.Option(help="Best tokens to report per token.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="System message, with --chat.")] = None,
    json_schema: _JsonSchema = None,
    regex: Annotated[str | None, typer.Option(help="What the whole output has to match.")] = None,
    session: _Session = "",
    prefix_handle: _PrefixHandle = "",
    model: Annotated[str, typer.Option(help="Name of the model; empty for any.")] = "",
    timeout: Annotated[float | None, typer.Option(help="Seconds that it may take.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    stdin_jsonl: Annotated[
        bool, typer.Option("--stdin-jsonl", help="Run one JSON request a line from stdin.")
    ] = False,
    server: Annotated[str | None, typer.Option(help="HOST:PORT [PAGEFRAME_SERVER].")] = None,
    state_dir: Annotated[Path | None, typer.Option(help="Where `pageframe up` runs.")] = None,
    api_key_file: ApiKeyFile = None,
    tls: TlsOption = None,
) -> None:
    """Continue a prompt. Streams text, or prints one JSON object with --json.

    Exit code 1 when a request failed.
    """
    if (prompt is None) != stdin_jsonl:
        raise typer.BadParameter("give a PROMPT or --stdin-jsonl, not both")
    if system is not None and not chat:
        raise typer.BadParameter("--system goes with --chat")
    request = GenerationRequest(
        model=model,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        num_logprobs=logprobs,
        ignore_eos=ignore_eos,
        max_tokens=max_tokens,
        num_samples=n if beams is None else 1,
        best_of=best_of,
        beam_search=_beam_search(beams, n, length_penalty, early_stopping),
        stop=tuple(stop or ()),
        grammar=_grammar(json_schema, regex),
        session_id=session,
        prefix_handle=prefix_handle,
        delivery=Delivery.FINAL if as_json or stdin_jsonl else None,
    )
    api_key = read_api_key(api_key_file)
    address = find_server(server, state_dir, os.environ)
    means = find_tls(tls, os.environ)
    if prompt is None:
        lines = [line for line in sys.stdin.buffer.read().split(b"\n") if line.strip()]
        raise typer.Exit(asyncio.run(_run_lines(lines, request, address, api_key, means, timeout)))
    request = _with_prompt(request, prompt, chat=chat, system=system)
    raise typer.Exit(_run_one(request, address, api_key, means, timeout, as_json=as_json))


def _beam_search(
    num_beams: int | None, num_return: int, length_penalty: float, early_stopping: str
) -> BeamParams | None:
    if num_beams is None:
        return None
    try:
        stopping = EarlyStopping[early_stopping.upper()]
    except KeyError:
        names = ", ".join(member.name.lower() for member in EarlyStopping)
        raise typer.BadParameter(f"--early-stopping is one of {names}") from None
    return BeamParams(
        num_beams=num_beams,
        num_return=num_return,
        length_penalty=length_penalty,
        early_stopping=stopping,
    )


def _grammar(json_schema: Path | None, regex: str | None) -> Grammar | None:
    if json_schema is not None and regex is not None:
        raise typer.BadParameter("give --json-schema or --regex, not both")
    if regex is not None:
        return Grammar(GrammarForm.REGEX, regex)
    if json_schema is None:
        return None
    try:
        return Grammar(GrammarForm.JSON_SCHEMA, json_schema.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"--json-schema cannot be read: {error}") from None


def _with_prompt(
    request: GenerationRequest, prompt: str, *, chat: bool, system: str | None
) -> GenerationRequest:
    text = sys.stdin.read() if prompt == "-" else prompt
    if not chat:
        return replace(request, prompt=text)
    messages = [] if system is None else [Message("system", system)]
    return replace(request, messages=[*messages, Message("user", text)])


def _run_one(
    request: GenerationRequest,
    address: str,
    api_key: str | None,
    tls: ClientTls | None,
    timeout_s: float | None,
    *,
    as_json: bool,
) -> int:
    """Run one request; returns the exit code."""
    try:
        with PageframeClient(address, api_key=api_key, retry_for_s=_RETRY_FOR_S, tls=tls) as client:
            events = client.generate(request, timeout_s=timeout_s)
            if as_json:
                print(_to_line(result_to_json(collect(list(events)))))
            elif request.num_outputs > 1:
                for index, sample in enumerate(collect(list(events)).samples):
                    print(f"[{index}] {sample.text}")
            else:
                _print_text(events)
    except PageframeError as error:
        if as_json:
            print(_to_line(error_to_json(error)))
        else:
            print(f"pageframe: {explained(error, address, tls)}", file=sys.stderr)
        return EXIT_FAILURE
    return EXIT_OK


def _print_text(events: Iterable[Event]) -> None:
    """Text as it comes."""
    for event in events:
        if isinstance(event, Delta):
            print(event.text, end="", flush=True)
    print()


async def _run_lines(
    lines: Sequence[bytes],
    defaults: GenerationRequest,
    address: str,
    api_key: str | None,
    tls: ClientTls | None,
    timeout_s: float | None,
) -> int:
    """Run all lines at once; print their results in the order of the input."""
    num_failed = 0
    slots = asyncio.Semaphore(_NUM_CONCURRENT_MAX)
    async with AsyncPageframeClient(
        address, api_key=api_key, retry_for_s=_RETRY_FOR_S, tls=tls
    ) as client:

        async def run(index: int, line: bytes) -> dict[str, object]:
            async with slots:
                try:
                    request = request_from_line(line, defaults)
                    result = await client.complete(request, timeout_s=timeout_s)
                except PageframeError as error:
                    return {"index": index, **error_to_json(error)}
                return {"index": index, **result_to_json(result)}

        tasks = [asyncio.create_task(run(index, line)) for index, line in enumerate(lines)]
        for task in tasks:
            outcome = await task
            num_failed += "error" in outcome
            print(_to_line(outcome), flush=True)
    return EXIT_FAILURE if num_failed else EXIT_OK


def _to_line(content: dict[str, object]) -> str:
    return json.dumps(content, ensure_ascii=False)
