"""TLS as a process is told of it: what it serves with, and what it calls others with.

    ServerTls   certificate and key; with ``client_ca`` callers have to show one, too (mutual TLS)
    ClientTls   whom to believe, and perhaps a certificate and key to show

Both are names of files. TLS is for TCP: a Unix socket has the rights of a file, and needs none.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc

from pageframe.core.errors import InvalidRequestError
from pageframe.rpc.tls_files import Identity, read_ca, read_identity

TLS_VARIABLE: Final = "PAGEFRAME_SERVER_TLS"
"""Where client commands find how to talk to the server."""

CLIENT_TLS_FORM: Final = "CA_FILE[,cert=FILE,key=FILE][,name=NAME]"

_PUBLIC: Final = "public"
_NAMES: Final = ("cert", "key", "name")
# As gRPC reports that its peer is not whom it should be.
_NOT_TRUSTED: Final = ("CERTIFICATE_VERIFY_FAILED", "Hostname Verification Check failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerMaterial:
    """What the files of a ``ServerTls`` hold."""

    identity: Identity
    client_ca_pem: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerTls:
    """What a server shows to its callers, and asks of them.

    Attributes:
        cert: PEM file of its certificate, and of those that lead from it to its CA.
        key: PEM file of its key.
        client_ca: PEM file of the CAs whose certificates callers must have; None lets in callers
            without any.
    """

    cert: Path
    key: Path
    client_ca: Path | None = None

    @property
    def paths(self) -> tuple[Path | None, ...]:
        """All its files."""
        return self.cert, self.key, self.client_ca

    def read(self) -> ServerMaterial:
        """Read all files.

        Raises:
            InvalidRequestError: as ``read_identity`` and ``read_ca``.
        """
        identity = read_identity(self.cert, self.key, is_server=True)
        client_ca_pem = None if self.client_ca is None else read_ca(self.client_ca)
        return ServerMaterial(identity=identity, client_ca_pem=client_ca_pem)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientTls:
    """What a caller believes, and shows.

    Attributes:
        ca: PEM file of the CAs (or certificates) that servers are known by; None for the public
            ones that gRPC brings along.
        cert: PEM file of the certificate to show to a server that asks for one; None for none.
        key: Its key.
        name: The name that the server's certificate has to carry; the host of the address unless
            given.
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    name: str = ""

    def credentials(self) -> grpc.ChannelCredentials:
        """Read all files, for a channel.

        Raises:
            InvalidRequestError: as ``read_identity`` and ``read_ca``.
        """
        ca_pem = None if self.ca is None else read_ca(self.ca)
        if self.cert is None or self.key is None:
            return grpc.ssl_channel_credentials(ca_pem)
        identity = read_identity(self.cert, self.key, is_server=False)
        return grpc.ssl_channel_credentials(ca_pem, identity.key_pem, identity.cert_pem)

    def options(self) -> list[tuple[str, str]]:
        """Options of a channel that go with the credentials."""
        return [("grpc.ssl_target_name_override", self.name)] if self.name else []


def make_server_tls(
    cert: Path | None, key: Path | None, client_ca: Path | None
) -> ServerTls | None:
    """What a server is told; None where it is told nothing and speaks plain text.

    Raises:
        InvalidRequestError: reason TLS_PAIR_INCOMPLETE.
    """
    _check_pair(cert, key)
    if cert is not None and key is not None:
        return ServerTls(cert=cert, key=key, client_ca=client_ca)
    if client_ca is not None:
        raise InvalidRequestError(
            "TLS_PAIR_INCOMPLETE",
            f"callers would be known by the CA in {client_ca}, but there is no certificate and no "
            "key to serve with; give all three",
            path=client_ca,
        )
    return None


def make_client_tls(
    *, ca: Path | None, cert: Path | None, key: Path | None, name: str
) -> ClientTls:
    """What a caller is told; the arguments are as for ``ClientTls``.

    Raises:
        InvalidRequestError: reason TLS_PAIR_INCOMPLETE.
    """
    _check_pair(cert, key)
    return ClientTls(ca=ca, cert=cert, key=key, name=name)


def parse_client_tls(text: str) -> ClientTls:
    """What a person wrote, as ``CLIENT_TLS_FORM`` has it; ``public`` for the CAs that all know.

        ca.pem                              the CA that the server is known by
        ca.pem,cert=me.pem,key=me.key       with a certificate to show, for mutual TLS
        public,name=gateway.example         the name that the server's certificate carries

    Raises:
        InvalidRequestError: reason TLS_MALFORMED or TLS_PAIR_INCOMPLETE.
    """
    ca, *further = text.split(",")
    values = dict(word.partition("=")[::2] for word in further)
    is_whole = ca and all(values.values()) and len(values) == len(further)
    if not is_whole or not set(values) <= set(_NAMES) or ca.partition("=")[0] in _NAMES:
        raise InvalidRequestError(
            "TLS_MALFORMED", f"malformed --tls: {text!r} must be {CLIENT_TLS_FORM}"
        )
    cert, key = values.get("cert"), values.get("key")
    return make_client_tls(
        ca=None if ca == _PUBLIC else Path(ca),
        cert=None if cert is None else Path(cert),
        key=None if key is None else Path(key),
        name=values.get("name", ""),
    )


def is_trust_refused(details: str) -> bool:
    """Whether a channel could not be opened because of who is at the other end, by gRPC's words."""
    return any(words in details for words in _NOT_TRUSTED)


def _check_pair(cert: Path | None, key: Path | None) -> None:
    if (cert is None) != (key is None):
        there, missing = ("certificate", "key") if key is None else ("key", "certificate")
        raise InvalidRequestError(
            "TLS_PAIR_INCOMPLETE",
            f"there is a {there} in {cert or key}, but no {missing} to go with it; give both or "
            "neither",
            path=cert or key,
        )
