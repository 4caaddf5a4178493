"""``pageframe pool``: the block pool of a running system, live; and what may be done to it."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pageframe.cli.api_key import ApiKeyFile, read_api_key
from pageframe.cli.executor_address import choose_executor, find_executors
from pageframe.cli.exit_codes import EXIT_FAILURE, EXIT_OK
from pageframe.cli.generation_json import error_to_json
from pageframe.cli.pool_json import (
    operation_to_json,
    resize_outcome_to_json,
    retention_facts_to_json,
    snapshot_to_json,
)
from pageframe.cli.pool_live import run_live
from pageframe.cli.pool_replicas import check_any, read_pools, render_pools, run_pools_live
from pageframe.cli.pool_view import explanation_lines, operation_line, render_pool
from pageframe.cli.server_address import find_server
from pageframe.cli.server_tls import TlsOption, find_tls
from pageframe.client import ClientTls, PageframeClient
from pageframe.client.kv_memory import KvMemoryClient
from pageframe.config.values import parse_duration_seconds
from pageframe.core.errors import PageframeError
from pageframe.core.replica import TenantQuota
from pageframe.wire.memory_json import explanation_to_json, pools_to_json

_NO_CEILING = ("-", "none")
_Action = Callable[..., None]
"""What is done with the client of one executor, or with those of all."""
# A person sees at once that nothing comes, and a script does not hang.
_TIMEOUT_S = 10.0


def pool(
    once: Annotated[bool, typer.Option("--once", help="Show it once and end.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Print operations on blocks as they happen.")
    ] = False,
    block: Annotated[int | None, typer.Option(help="Tell who holds this block, and why.")] = None,
    resize: Annotated[int | None, typer.Option(help="Give the pool so many blocks.")] = None,
    quota: Annotated[
        tuple[str, int, str] | None,
        typer.Option(help="Bound a tenant: TENANT FLOOR CEILING; ceiling - for none."),
    ] = None,
    retain: Annotated[
        str | None, typer.Option(help="Keep the blocks of this text; prints a handle.")
    ] = None,
    retain_tokens: Annotated[
        str | None, typer.Option(help="Keep the blocks of these token ids, like 5,17,9.")
    ] = None,
    ttl: Annotated[str, typer.Option(help='How long to keep them ("10m").')] = "10m",
    request_id: Annotated[str, typer.Option(help="Same id and text, same handle.")] = "",
    release: Annotated[str | None, typer.Option(help="Give a handle back.")] = None,
    from_operation: Annotated[
        int, typer.Option(help="With --watch: begin with this operation; 0 with the next.")
    ] = 0,
    interval: Annotated[float, typer.Option(help="Seconds between two looks.")] = 1.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document; with --watch one a line.")
    ] = False,
    replica: Annotated[
        str, typer.Option(help="Which of several, by name or address; without, a list of all.")
    ] = "",
    server: Annotated[
        str | None, typer.Option(help="The executor: unix:/path or HOST:PORT.")
    ] = None,
    state_dir: Annotated[Path | None, typer.Option(help="Where `pageframe up` runs.")] = None,
    api_key_file: ApiKeyFile = None,
    tls: TlsOption = None,
) -> None:
    """Show the block pool, live: who holds what, and why. Or act on it with one of the options.

    Ends with Ctrl-C; where the output is no terminal, after the first look. Exit code 1 when the
    server refused, 2 when the call is wrong or nothing runs.
    """
    if interval <= 0:
        raise typer.BadParameter("--interval must be above 0")
    means = _Means(read_api_key(api_key_file), find_tls(tls, os.environ))

    def tokenize(text: str) -> list[int]:
        """Token ids of a text, from the gateway of the same system."""
        with means.gateway(find_server(None, state_dir, os.environ)) as client:
            return client.tokenize(text)

    actions = [
        *_looks(watch=watch, block=block, from_operation=from_operation, as_json=as_json),
        *_changes(resize=resize, quota=quota, release=release, as_json=as_json),
        *_keeps(retain, retain_tokens, ttl, request_id, tokenize, as_json=as_json),
    ]
    if len(actions) > 1:
        raise typer.BadParameter("it does one thing at a time: give one option that acts")
    executors = find_executors(server, state_dir, os.environ)
    is_all = not actions and not replica
    addresses = [*executors.values()] if is_all else [choose_executor(executors, replica)]

    def look(*memories: KvMemoryClient) -> None:
        """One whole, or a list of several."""
        if len(memories) == 1:
            _show(memories[0], interval, once=once, as_json=as_json)
        else:
            _list([*executors], memories, interval, once=once, as_json=as_json)

    raise typer.Exit(_run(actions[0] if actions else look, addresses, means, as_json=as_json))


def _looks(
    *, watch: bool, block: int | None, from_operation: int, as_json: bool
) -> Iterator[_Action]:
    if watch:
        _check_range("--from-operation", from_operation, 1 << 64)
        yield lambda memory: _watch(memory, from_operation, as_json=as_json)
    if block is not None:
        _check_range("--block", block)
        yield lambda memory: _explain(memory, block, as_json=as_json)


def _changes(
    *,
    resize: int | None,
    quota: tuple[str, int, str] | None,
    release: str | None,
    as_json: bool,
) -> Iterator[_Action]:
    if resize is not None:
        _check_range("--resize", resize)
        yield lambda memory: _resize(memory, resize, as_json=as_json)
    if quota is not None:
        bounds = _parse_quota(*quota)
        yield lambda memory: _set_quota(memory, bounds, as_json=as_json)
    if release is not None:
        yield lambda memory: _release(memory, release, as_json=as_json)


def _keeps(
    text: str | None,
    token_ids: str | None,
    ttl: str,
    request_id: str,
    tokenize: Callable[[str], list[int]],
    *,
    as_json: bool,
) -> Iterator[_Action]:
    if text is not None:
        ttl_s = _parse_ttl(ttl)
        yield lambda memory: _retain(memory, tokenize(text), ttl_s, request_id, as_json=as_json)
    if token_ids is not None:
        ids, ids_ttl_s = _parse_token_ids(token_ids), _parse_ttl(ttl)
        yield lambda memory: _retain(memory, ids, ids_ttl_s, request_id, as_json=as_json)


def _run(action: _Action, addresses: Sequence[str], means: "_Means", *, as_json: bool) -> int:
    """Do it with a client of each executor; returns the exit code."""
    try:
        with contextlib.ExitStack() as stack:
            action(*(stack.enter_context(means.executor(it)) for it in addresses))
    except PageframeError as error:
        if as_json:
            _print_json(error_to_json(error))
        else:
            print(f"pageframe: {error.reason}: {error.message}", file=sys.stderr)
        return EXIT_FAILURE
    return EXIT_OK


@dataclass(frozen=True, slots=True)
class _Means:
    """What servers are called with."""

    api_key: str | None
    tls: ClientTls | None

    def executor(self, address: str) -> KvMemoryClient:
        return KvMemoryClient(address, api_key=self.api_key, timeout_s=_TIMEOUT_S, tls=self.tls)

    def gateway(self, address: str) -> PageframeClient:
        return PageframeClient(address, api_key=self.api_key, tls=self.tls)


def _list(
    names: Sequence[str],
    memories: Sequence[KvMemoryClient],
    interval_s: float,
    *,
    once: bool,
    as_json: bool,
) -> None:
    """Show how full the pools of all replicas are."""
    clients = dict(zip(names, memories, strict=True))
    console = Console(highlight=False, markup=False)
    pools = read_pools(clients)
    check_any(pools)
    if as_json:
        _print_json(pools_to_json(pools))
    elif console.is_terminal and not once:
        run_pools_live(lambda: read_pools(clients), console, interval_s)
    else:
        console.print(render_pools(pools))


def _show(memory: KvMemoryClient, interval_s: float, *, once: bool, as_json: bool) -> None:
    if as_json:
        _print_json(snapshot_to_json(memory.snapshot()))
        return
    console = Console(highlight=False, markup=False)
    if console.is_terminal and not once:
        run_live(memory, console, interval_s)
        return
    console.print(render_pool(memory.snapshot(), now_ns=time.time_ns(), width=console.width))


def _watch(memory: KvMemoryClient, first_operation: int, *, as_json: bool) -> None:
    """Print operations until Ctrl-C; what was lost is said where it is missing."""
    with memory.watch(first_operation) as batches:
        try:
            for batch in batches:
                if batch.num_lost:
                    lost = {"num_lost": batch.num_lost}
                    print(json.dumps(lost) if as_json else f"{batch.num_lost} operations lost")
                named = {it.sequence_id: it for it in batch.sequences}
                for record in batch.operations:
                    whose = named.get(record.sequence_id)
                    line = json.dumps(operation_to_json(record, whose)) if as_json else None
                    print(line or operation_line(record, whose))
                sys.stdout.flush()
        except KeyboardInterrupt:
            # The way to leave.
            return


def _explain(memory: KvMemoryClient, block_id: int, *, as_json: bool) -> None:
    explanation = memory.explain(block_id)
    if as_json:
        _print_json(explanation_to_json(explanation))
        return
    for line in explanation_lines(explanation, time.time_ns()):
        print(line)


def _resize(memory: KvMemoryClient, num_blocks: int, *, as_json: bool) -> None:
    outcome = memory.resize(num_blocks)
    if as_json:
        _print_json(resize_outcome_to_json(outcome))
        return
    print(f"the pool has {outcome.account.total} blocks; {outcome.num_blocks_moved} were moved")


def _set_quota(memory: KvMemoryClient, quota: TenantQuota, *, as_json: bool) -> None:
    num_held = memory.set_quota(quota)
    if as_json:
        _print_json({"tenant": quota.tenant, "num_blocks_held": num_held})
        return
    print(f"tenant {quota.tenant} holds {num_held} blocks now")


def _release(memory: KvMemoryClient, handle: str, *, as_json: bool) -> None:
    memory.release(handle)
    if as_json:
        _print_json({"released": handle})
        return
    print(f"{handle} is released")


def _retain(
    memory: KvMemoryClient, token_ids: list[int], ttl_s: float, request_id: str, *, as_json: bool
) -> None:
    facts = memory.retain(token_ids, time_to_live_s=ttl_s, request_id=request_id)
    if as_json:
        _print_json(retention_facts_to_json(facts))
        return
    print(f"{facts.num_tokens} of {len(token_ids)} tokens are kept now", file=sys.stderr)
    # Alone on standard output, for scripts.
    print(facts.name)


def _parse_quota(tenant: str, floor_blocks: int, ceiling: str) -> TenantQuota:
    is_number = ceiling.isascii() and ceiling.isdecimal()
    if not is_number and ceiling not in _NO_CEILING:
        raise typer.BadParameter(f"--quota: the ceiling must be a number or -, it is {ceiling!r}")
    ceiling_blocks = int(ceiling) if is_number else None
    _check_range("--quota: the floor", floor_blocks)
    _check_range("--quota: the ceiling", ceiling_blocks or 0)
    return TenantQuota(tenant=tenant, floor_blocks=floor_blocks, ceiling_blocks=ceiling_blocks)


def _parse_ttl(text: str) -> float:
    try:
        return parse_duration_seconds(text)
    except ValueError as error:
        raise typer.BadParameter(f"--ttl {error}") from None


def _parse_token_ids(text: str) -> list[int]:
    words = text.replace(",", " ").split()
    if not words or not all(word.isascii() and word.isdecimal() for word in words):
        raise typer.BadParameter("--retain-tokens must be token ids like 5,17,9")
    token_ids = [int(word) for word in words]
    _check_range("--retain-tokens: a token id", max(token_ids))
    return token_ids


def _check_range(what: str, number: int, end: int = 1 << 32) -> None:
    """Refuse what does not fit into a message; what fits is for the server to judge."""
    if not 0 <= number < end:
        raise typer.BadParameter(f"{what} must lie in [0, {end}), it is {number}")


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, ensure_ascii=False))
