"""The option of client commands that talk to a server over TLS."""

from collections.abc import Mapping
from typing import Annotated

import typer

from pageframe.rpc.tls import CLIENT_TLS_FORM, TLS_VARIABLE, ClientTls, parse_client_tls

TlsOption = Annotated[
    str | None,
    typer.Option(
        "--tls",
        help="Talk TLS: the file of the CA that the server is known by, or `public` for those that "
        f"everybody knows; and what to show: {CLIENT_TLS_FORM} [{TLS_VARIABLE}].",
        metavar="CA_FILE",
    ),
]
"""The option of a command."""


def find_tls(given: str | None, environ: Mapping[str, str]) -> ClientTls | None:
    """What was given, else what the environment says; None for plain text.

    Raises:
        InvalidRequestError: as ``parse_client_tls``, or files are amiss.
    """
    text = given or environ.get(TLS_VARIABLE)
    if not text:
        return None
    tls = parse_client_tls(text)
    # Before anything else is done; a wrong file is no failure of a server.
    tls.credentials()
    return tls
