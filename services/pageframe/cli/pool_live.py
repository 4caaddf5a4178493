"""The block pool in a terminal, drawn anew every second until Ctrl-C."""

import time
from typing import Final

from rich.console import Console
from rich.live import Live

from pageframe.cli.pool_tally import WatchingTally
from pageframe.cli.pool_view import render_pool
from pageframe.client.kv_memory import KvMemoryClient
from pageframe.core.errors import DeadlineError, PageframeError, UnavailableError

_AWAY: Final = (UnavailableError, DeadlineError)


def run_live(client: KvMemoryClient, console: Console, interval_s: float) -> None:
    """Show the pool until Ctrl-C. An executor that goes away is waited for.

    Raises:
        PageframeError: the first snapshot failed, or the server refuses them.
    """
    snapshot = client.snapshot()
    note = ""
    try:
        with WatchingTally(client) as tally, Live(console=console, auto_refresh=False) as live:
            while True:
                view = render_pool(
                    snapshot,
                    now_ns=time.time_ns(),
                    width=console.width,
                    rates=tally.rates(),
                    note=note,
                )
                live.update(view, refresh=True)
                time.sleep(interval_s)
                try:
                    snapshot, note = client.snapshot(), ""
                except PageframeError as error:
                    if not isinstance(error, _AWAY):
                        raise
                    note = f"the executor is away ({error.message}); this is how it was"
    except KeyboardInterrupt:
        # The way to leave.
        return
