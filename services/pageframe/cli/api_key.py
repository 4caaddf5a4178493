"""The API key of client commands: from a file, so that no list of processes shows it."""

from pathlib import Path
from typing import Annotated

import typer

from pageframe.core.errors import InvalidRequestError

ApiKeyFile = Annotated[
    Path | None, typer.Option(help="File with the API key, where the server wants one.")
]
"""The option of a command."""


def read_api_key(path: Path | None) -> str | None:
    """The key in a file, which holds nothing else; None without a file.

    Raises:
        InvalidRequestError: API_KEY_UNREADABLE or API_KEY_MALFORMED.
    """
    if path is None:
        return None
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(
            "API_KEY_UNREADABLE", f"cannot read the API key in {path}: {error}"
        ) from None
    if len(key.split()) != 1:
        raise InvalidRequestError("API_KEY_MALFORMED", f"{path} must hold one key and nothing else")
    return key
