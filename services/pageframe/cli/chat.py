"""``pageframe chat``: a conversation in the terminal, through a running server.

On a terminal there is a prompt, and lines that begin with ``/`` are commands; Ctrl-C stops an
answer and not the program. Without one every line of standard input is a turn, and nothing but
answers goes to standard output.
"""

import difflib
import json
import os
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console
from rich.text import Text

from pageframe.cli.api_key import ApiKeyFile, read_api_key
from pageframe.cli.chat_talk import Answer, Talk
from pageframe.cli.exit_codes import EXIT_FAILURE, EXIT_OK
from pageframe.cli.generation_json import error_to_json
from pageframe.cli.server_address import explained, find_server
from pageframe.cli.server_tls import TlsOption, find_tls
from pageframe.client import ClientTls, GenerationRequest, PageframeClient
from pageframe.core.errors import PageframeError

# How long a server may be away before a turn fails.
_RETRY_FOR_S = 5.0
_PROMPT = "you> "
_HELP = """\
/reset          forget what was said
/system TEXT    another system message; begins anew
/stats          what the last answer cost
/help           this
/quit           end; so does Ctrl-D. Ctrl-C stops an answer."""


def chat(
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    once: Annotated[
        str | None, typer.Option(help="Say this, print the answer and end; - reads stdin.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of an answer.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the best token.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep this much probability.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same tokens.")] = None,
    model: Annotated[str, typer.Option(help="Name of the model; empty for any.")] = "",
    timeout: Annotated[float | None, typer.Option(help="Seconds that a turn may take.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object for each turn.")
    ] = False,
    server: Annotated[str | None, typer.Option(help="HOST:PORT [PAGEFRAME_SERVER].")] = None,
    state_dir: Annotated[Path | None, typer.Option(help="Where `pageframe up` runs.")] = None,
    api_key_file: ApiKeyFile = None,
    tls: TlsOption = None,
) -> None:
    """Talk to the model. Its blocks are kept from turn to turn, so only what is new is computed.

    Exit code 1 when a turn failed and nobody was there to see it.
    """
    defaults = GenerationRequest(
        model=model, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    api_key = read_api_key(api_key_file)
    address = find_server(server, state_dir, os.environ)
    means = find_tls(tls, os.environ)
    with PageframeClient(address, api_key=api_key, retry_for_s=_RETRY_FOR_S, tls=means) as client:
        talk = Talk(client, defaults, system=system, timeout_s=timeout)
        turn = Turn(talk, address, print_json if as_json else print_text, means)
        if once is not None:
            is_good = turn.take(sys.stdin.read() if once == "-" else once)
        elif sys.stdin.isatty():
            converse(turn, Console(stderr=True, highlight=False))
            is_good = True
        else:
            # The lines behind a turn that failed are turns, too.
            num_failed = sum(not turn.take(line) for line in _lines())
            is_good = num_failed == 0
    raise typer.Exit(EXIT_OK if is_good else EXIT_FAILURE)


class Turn:
    """Says something and shows the answer.

    Args:
        talk: The conversation.
        address: Of the server, for messages.
        show: Shows an answer while it comes; returns when it has ended.
        tls: How the server is talked to, for messages.
    """

    def __init__(
        self,
        talk: Talk,
        address: str,
        show: Callable[[Talk, Iterator[str]], None],
        tls: ClientTls | None = None,
    ) -> None:
        self.talk = talk
        self._address = address
        self._tls = tls
        self._show = show

    def take(self, text: str) -> bool:
        """One turn; returns whether it came to an answer."""
        # Closed before anything else happens, so that a stopped answer is cancelled at once.
        with closing(cast("Generator[str]", self.talk.ask(text))) as pieces:
            try:
                self._show(self.talk, pieces)
            except PageframeError as error:
                if self._show is print_json:
                    _print_line(json.dumps(error_to_json(error), ensure_ascii=False))
                print(f"\npageframe: {explained(error, self._address, self._tls)}", file=sys.stderr)
                return False
        return True


def print_text(_talk: Talk, pieces: Iterator[str]) -> None:
    """The answer as it comes."""
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    _print_line("")


def print_json(talk: Talk, pieces: Iterator[str]) -> None:
    """One object once it has ended."""
    for _ in pieces:
        pass
    assert talk.last is not None, "a turn has an answer"
    _print_line(json.dumps(answer_to_json(talk.session_id, talk.last), ensure_ascii=False))


def answer_to_json(session_id: str, answer: Answer) -> dict[str, object]:
    """What a machine may want to know of an answer."""
    account = answer.account
    reason = answer.finish_reason
    return {
        "text": answer.text,
        "finish_reason": None if reason is None else reason.name.lower(),
        "usage": {
            "prompt_tokens": account.num_prompt_tokens,
            "cached_tokens": account.num_cached_tokens,
            "completion_tokens": account.num_completion_tokens,
        },
        "session_id": session_id,
        "trace_id": answer.trace_id,
        "first_token_s": answer.first_token_s,
        "elapsed_s": answer.elapsed_s,
    }


def converse(turn: Turn, console: Console) -> None:
    """Talk to a person until they have enough."""
    # Editing of lines and a history; some builds of Python have none.
    try:
        import readline  # noqa: F401
    except ImportError:
        console.print("this Python has no readline: lines cannot be edited", style="dim")
    console.print("Say something; /help shows what else there is.", style="dim")
    while True:
        try:
            line = input(_PROMPT).strip()
        except KeyboardInterrupt:
            console.print("\nCtrl-D or /quit ends.", style="dim")
            continue
        except EOFError:
            console.print()
            return
        if line.startswith("/"):
            if not _command(turn.talk, line, console):
                return
        elif line:
            _take(turn, line, console)


def _take(turn: Turn, line: str, console: Console) -> None:
    try:
        turn.take(line)
    except KeyboardInterrupt:
        console.print("\n(stopped)", style="yellow")


def _command(talk: Talk, line: str, console: Console) -> bool:
    """Do what a line beginning with ``/`` asks for; returns whether to go on."""
    name, _, rest = line[1:].partition(" ")
    match name:
        case "quit" | "exit":
            return False
        case "reset":
            talk.reset()
            console.print("Forgotten.", style="dim")
        case "system":
            talk.set_system(rest.strip())
            console.print("Begun anew.", style="dim")
        case "stats":
            console.print(stats(talk))
        case "help":
            console.print(_HELP, style="dim")
        case _:
            names = ["reset", "system", "stats", "help", "quit"]
            near = difflib.get_close_matches(name, names, n=1)
            meant = f"; did you mean /{near[0]}?" if near else "; /help shows what there is"
            console.print(f"there is no /{name}{meant}", style="red", markup=False)
    return True


def stats(talk: Talk) -> Text:
    """What the last answer cost, for people."""
    answer = talk.last
    if answer is None:
        return Text("Nothing was said yet.")
    account = answer.account
    first_token_s = answer.first_token_s or 0.0
    lines = [
        f"turns         {talk.num_turns}, session {talk.session_id}",
        f"prompt        {account.num_prompt_tokens} tokens, {account.num_cached_tokens} of them "
        "found in memory",
        f"answer        {account.num_completion_tokens} tokens, "
        f"{answer.num_tokens_per_second:.1f} a second",
        f"first token   {first_token_s * 1000:.0f} ms",
        f"blocks        {account.num_blocks_peak} at most, {account.num_blocks_shared} shared, "
        f"{account.num_preemptions} preemptions",
    ]
    waits = sorted(account.stall_ns.items(), key=lambda item: -item[1])
    if waits:
        named = [f"{cause.name.lower()} {waited_ns / 1e6:.1f} ms" for cause, waited_ns in waits]
        lines.append(f"waited        {', '.join(named)}")
    if answer.trace_id:
        lines.append(f"trace         {answer.trace_id}")
    return Text("\n".join(lines))


def _lines() -> Iterator[str]:
    for line in sys.stdin:
        if text := line.strip():
            yield text


def _print_line(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
