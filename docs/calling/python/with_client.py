"""Calls Pageframe's gateway with its own client, which goes on by itself where a stream breaks.

    python with_client.py generate|cancel|refuse|expire HOST:PORT [API_KEY]

Prints one JSON object a line: what came, and how it ended.
"""

import json
import sys
from typing import Any

from pageframe.client import Delta, Finished, GenerationRequest, PageframeClient, Started
from pageframe.core.errors import PageframeError

REQUESTS: dict[str, dict[str, Any]] = {
    "generate": {"request_id": "a-whole-one"},
    "cancel": {"request_id": "a-cancelled-one"},
    "refuse": {"temperature": -1.0},
    "expire": {"max_tokens": 3000},
}


def show(event: Started | Delta | Finished) -> None:
    """One line for each event."""
    match event:
        case Started():
            told: dict[str, object] = {"request_id": event.request_id, "seed": str(event.seed)}
        case Delta():
            told = {"token_ids": event.token_ids, "text": event.text}
        case Finished():
            told = {"finish_reason": f"FINISH_REASON_{event.finish_reason.name}"}
    print(json.dumps(told), flush=True)


def main(command: str, address: str, key: str | None = None) -> None:
    """Run one of the commands."""
    fields: dict[str, Any] = {"max_tokens": 150, "seed": 1} | REQUESTS[command]
    request = GenerationRequest(token_ids=[7, 8, 9], ignore_eos=True, **fields)
    timeout_s = 0.5 if command == "expire" else 60.0
    is_cancelled = command != "cancel"
    with PageframeClient(address, api_key=key) as client:
        try:
            for event in client.generate(request, timeout_s=timeout_s):
                show(event)
                if isinstance(event, Delta) and not is_cancelled:
                    client.cancel(request.request_id)
                    is_cancelled = True
        except PageframeError as error:
            told = {"status": error.status, "reason": error.reason, "limits": dict(error.limits)}
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
