"""Certificates for tests, made by the ``openssl`` command where the test runs."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

NAMES = "subjectAltName=IP:127.0.0.1,DNS:localhost,DNS:inside.example"


@dataclass(frozen=True)
class Pair:
    """A certificate and its key."""

    cert: Path
    key: Path

    def replace_by(self, other: "Pair") -> None:
        """Put another pair in this one's files, as a renewal does: whole files, one by one."""
        for mine, theirs in ((self.cert, other.cert), (self.key, other.key)):
            partial = mine.with_suffix(".partial")
            partial.write_bytes(theirs.read_bytes())
            partial.replace(mine)


class Authority:
    """A CA of its own. ``pem`` is what knows those whom it signed for."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._folder = folder
        self._own = Pair(folder / f"{name}.pem", folder / f"{name}.key")
        extensions = ("basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign")
        _openssl(
            *("req", "-x509", *_new_key(self._own.key), "-out", self._own.cert, "-days", "9"),
            *("-subj", f"/CN={name}"),
            *(word for extension in extensions for word in ("-addext", extension)),
        )

    @property
    def pem(self) -> Path:
        return self._own.cert

    def issue(self, name: str, *, days: int = 9, extension: str = NAMES) -> Pair:
        """A certificate for this machine; with 0 days it is over at once."""
        made = Pair(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        request, extensions = made.cert.with_suffix(".csr"), made.cert.with_suffix(".ext")
        extensions.write_text(extension)
        _openssl("req", *_new_key(made.key), "-out", request, "-subj", f"/CN={name}")
        _openssl(
            *("x509", "-req", "-in", request, "-out", made.cert, "-days", str(days)),
            *("-CA", self._own.cert, "-CAkey", self._own.key, "-CAcreateserial"),
            *("-extfile", extensions),
        )
        return made


def encrypt_key(key: Path) -> None:
    """Have a key ask for a passphrase."""
    _openssl("pkcs8", "-topk8", "-in", key, "-out", key.with_suffix(".enc"), "-passout", "pass:a b")
    key.with_suffix(".enc").replace(key)


def _new_key(key: Path) -> tuple[str | Path, ...]:
    return ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", key)


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)
