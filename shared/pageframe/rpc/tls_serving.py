"""Serving with certificates that are replaced while the process runs.

    a caller knocks ─▶ look at the files ─▶ as before: go on with what they held
                                          └▶ changed:   read and try them ─▶ good: from now on these
                                                                           └▶ bad:  say so once

The look costs three calls of ``stat`` for a connection, nothing for a request, and nothing while
nobody comes. Connections that are open go on as they are. The idea is gRPC's own (a fetcher that is
asked at each handshake); the HTTP door does the same from OpenSSL's callback for server names.
"""

import ssl
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import grpc
import structlog

from pageframe.core.errors import PageframeError
from pageframe.rpc.tls import ServerMaterial, ServerTls
from pageframe.rpc.tls_files import files_signature

_log = structlog.get_logger(__name__)

_Made = TypeVar("_Made")


class ServerFiles(Generic[_Made]):
    """What is made of the files of one server: as they are now, or were when they were last good.

    May be asked from any thread.

    Args:
        tls: Names the files.
        make: Makes of the files, and of what they hold, whatever it is that serves them.

    Attributes:
        made: The newest that was made.

    Raises:
        InvalidRequestError: as ``ServerTls.read``.
    """

    def __init__(self, tls: ServerTls, make: Callable[[ServerTls, ServerMaterial], _Made]) -> None:
        self._tls = tls
        self._make = make
        self._lock = threading.Lock()
        # Before they are read: a change in between is seen at the next look.
        self._seen = files_signature(tls.paths)
        self.made = self._read("tls_certificate_read")

    def look(self) -> bool:
        """Look at the files; whether ``made`` is another now."""
        with self._lock:
            signature = files_signature(self._tls.paths)
            if signature == self._seen:
                return False
            # First of all, so that what is wrong with files is said once.
            self._seen = signature
            try:
                self.made = self._read("tls_certificate_replaced")
            except PageframeError as error:
                _log.warning("tls_files_refused", reason=error.reason, message=error.message)
                return False
            except (OSError, ssl.SSLError) as error:
                # They changed again while they were read; the next look sees that.
                _log.warning("tls_files_refused", reason="CHANGING", message=str(error))
                return False
            return True

    def _read(self, event: str) -> _Made:
        material = self._tls.read()
        made = self._make(self._tls, material)
        _log.info(event, path=str(self._tls.cert), not_after=material.identity.not_after)
        return made


def server_credentials(tls: ServerTls) -> grpc.ServerCredentials:
    """Credentials for a gRPC port, which follow their files.

    Raises:
        InvalidRequestError: as ``ServerTls.read``.
    """
    files = ServerFiles(tls, _configuration)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        return files.made if files.look() else None

    return grpc.dynamic_ssl_server_credentials(
        files.made,
        fetch,  # type: ignore[arg-type]  # gRPC takes None, too: nothing has changed
        require_client_authentication=tls.client_ca is not None,
    )


def server_context(tls: ServerTls) -> ssl.SSLContext:
    """The same for a port of Python's own ``ssl``, which speaks HTTP/1.1.

    Raises:
        InvalidRequestError: as ``ServerTls.read``.
    """
    files = ServerFiles(tls, _context)

    def on_hello(
        connection: ssl.SSLObject, _server_name: str | None, _listening: ssl.SSLContext
    ) -> None:
        files.look()
        connection.context = files.made

    listening = files.made
    listening.sni_callback = on_hello
    return listening


def _configuration(
    _tls: ServerTls, material: ServerMaterial
) -> grpc.ServerCertificateConfiguration:
    identity = material.identity
    return grpc.ssl_server_certificate_configuration(
        [(identity.key_pem, identity.cert_pem)], root_certificates=material.client_ca_pem
    )


def _context(tls: ServerTls, _material: ServerMaterial) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(tls.cert, tls.key)
    context.set_alpn_protocols(["http/1.1"])
    if tls.client_ca is not None:
        context.load_verify_locations(cafile=tls.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context
