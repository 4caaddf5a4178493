"""The pools of several replicas in one list with totals.

replica     in use  blocks  held  pinned  cached  fenced  free
executor      62 %     512   317       0     102       0    93
executor-1    away: nobody answers
total         62 %     512   317       0     102       0    93
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pageframe.client.kv_memory import KvMemoryClient
from pageframe.core.errors import DeadlineError, UnavailableError
from pageframe.core.replica import PoolAccount
from pageframe.wire.memory_facts import ReplicaPool
from pageframe.wire.memory_json import sum_of

ReadPools = Callable[[], Sequence[ReplicaPool]]
"""Looks at all pools."""

_AWAY: Final = (UnavailableError, DeadlineError)
_COUNTS: Final = ("total", "held", "pinned", "cached", "fenced", "free")
_HEADINGS: Final = ("in use", "blocks", *_COUNTS[1:])


def read_pools(clients: Mapping[str, KvMemoryClient]) -> list[ReplicaPool]:
    """The pool of each replica, all asked at once: one that is away holds up no other.

    Args:
        clients: Of each replica, by its name; at least one.

    Raises:
        PageframeError: an executor refuses.
    """

    def read(name: str) -> ReplicaPool:
        try:
            return ReplicaPool(name, clients[name].account())
        except _AWAY as error:
            return ReplicaPool(name, None, error.message)

    with ThreadPoolExecutor(len(clients)) as threads:
        return list(threads.map(read, clients))


def check_any(pools: Sequence[ReplicaPool]) -> None:
    """Refuse a list of replicas of which not one is there.

    Raises:
        UnavailableError: reason REPLICAS_AWAY.
    """
    if all(it.account is None for it in pools):
        names = ", ".join(f"{it.replica} ({it.away})" for it in pools)
        raise UnavailableError("REPLICAS_AWAY", f"no executor answers: {names}")


def render_pools(pools: Sequence[ReplicaPool]) -> RenderableType:
    """The list."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    # A long address takes several lines, not the room of the numbers.
    table.add_column("replica", overflow="fold")
    for heading in _HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for pool in pools:
        cells = ["away"] if pool.account is None else _cells(pool.account)
        table.add_row(pool.replica, *cells)
    table.add_row("total", *_cells(sum_of(pools)), style="bold")
    away = [Text(f"{it.replica} is away: {it.away}", style="yellow") for it in pools if it.away]
    hint = Text(f"show one whole: pageframe pool --replica {pools[0].replica}", style="dim")
    return Group(table, *away, hint)


def run_pools_live(read: ReadPools, console: Console, interval_s: float) -> None:
    """Show the list until Ctrl-C; replicas that go away are waited for.

    Raises:
        PageframeError: an executor refuses.
    """
    try:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(render_pools(read()), refresh=True)
                time.sleep(interval_s)
    except KeyboardInterrupt:
        # The way to leave.
        return


def _cells(account: PoolAccount) -> list[str]:
    num_idle = account.free + account.cached
    share = 1 - num_idle / account.total if account.total else 0.0
    return [f"{share:.0%}".replace("%", " %"), *(f"{getattr(account, it):,}" for it in _COUNTS)]
