"""``pageframe key``: a new API key, and the line by which an access file knows it."""

import json
import re
import secrets
import sys
from typing import Annotated

import typer

from pageframe.rpc.auth import hashed_key

_PREFIX = "pf-"
_NUM_RANDOM_BYTES = 32
# What can stand in a line of words, and in a quota.
_TENANT = re.compile(r"[^=,:#\s]+")


def key(
    tenant: Annotated[str, typer.Argument(help="Whose key it is to be.")],
    operator: Annotated[
        bool, typer.Option("--operator", help="It may resize the pool and see all tenants.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make an API key. It is printed once and kept nowhere.

    The key goes to standard output, and the line for the file of --api-keys to standard error.
    """
    if not _TENANT.fullmatch(tenant):
        raise typer.BadParameter("a tenant's name has no spaces and none of `=,:#`")
    made = _PREFIX + secrets.token_urlsafe(_NUM_RANDOM_BYTES)
    line = f"{hashed_key(made)} {tenant}" + (" operator" if operator else "")
    if as_json:
        print(json.dumps({"key": made, "line": line}))
        return
    print(f"for the file of --api-keys:\n{line}\nthe key:", file=sys.stderr)
    print(made)
