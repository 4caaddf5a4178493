"""The PEM files of TLS, read and tried out before anybody relies on them.

A certificate and its key are tried by a handshake in memory: whoever shows them meets whoever
trusts just that certificate. That finds all that a peer would find wrong with them, as the library
itself sees it.
"""

import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from pageframe.core.errors import InvalidRequestError

# X509_V_FLAG_NO_CHECK_TIME of OpenSSL, which the ssl module does not name: times are judged here,
# so that the message can tell them.
_NO_CHECK_TIME: Final = 0x200000
_MISMATCHES: Final = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH")
_NUM_FLIGHTS_MAX: Final = 10

FileSignature = tuple[tuple[int, int, int] | None, ...]


@dataclass(frozen=True, slots=True)
class Identity:
    """A certificate, with those that lead from it to its CA, and its key.

    Attributes:
        cert_pem: The file of the certificate.
        key_pem: The file of the key.
        not_after: When the certificate expires, as it says it itself.
    """

    cert_pem: bytes
    key_pem: bytes
    not_after: str


def read_identity(cert: Path, key: Path, *, is_server: bool) -> Identity:
    """Read a certificate and its key, as a peer will see them.

    Args:
        cert: PEM file; the certificate comes first.
        key: PEM file; not encrypted.
        is_server: Whether it is shown to those who call, or to those who are called.

    Raises:
        InvalidRequestError: reason TLS_FILE_UNREADABLE, TLS_CERTIFICATE_MALFORMED,
            TLS_KEY_MALFORMED, TLS_KEY_ENCRYPTED, TLS_KEY_MISMATCH, TLS_CERTIFICATE_EXPIRED,
            TLS_CERTIFICATE_NOT_YET_VALID or TLS_CERTIFICATE_UNUSABLE; each names the file.
    """
    cert_pem, key_pem = read_file(cert), read_file(key)
    trusting = _context(is_server=not is_server)
    _load_anchors(trusting, cert)
    trusting.verify_mode = ssl.CERT_REQUIRED
    # The certificate itself is what is trusted, whoever signed it.
    trusting.verify_flags = ssl.VerifyFlags(
        trusting.verify_flags | ssl.VERIFY_X509_PARTIAL_CHAIN | _NO_CHECK_TIME
    )
    showing = _context(is_server=is_server)
    showing.verify_mode = ssl.CERT_NONE
    _load_pair(showing, cert, key)
    if not is_server:
        # A server has to show something before it may ask.
        _load_pair(trusting, cert, key)
    seen = _shown_certificate(showing, trusting, cert, is_server=is_server)
    _check_time(cert, seen)
    return Identity(cert_pem, key_pem, str(seen["notAfter"]))


def read_ca(path: Path) -> bytes:
    """Read the certificates by which others are known.

    Raises:
        InvalidRequestError: reason TLS_FILE_UNREADABLE, TLS_CERTIFICATE_MALFORMED, or
            TLS_CERTIFICATE_EXPIRED, when none of them is valid any more.
    """
    pem = read_file(path)
    context = _context(is_server=False)
    _load_anchors(context, path)
    authorities: list[dict[str, Any]] = context.get_ca_certs()
    ends = [str(authority["notAfter"]) for authority in authorities]
    if ends and all(ssl.cert_time_to_seconds(end) <= time.time() for end in ends):
        raise _expired(path, max(ends, key=ssl.cert_time_to_seconds))
    return pem


def read_file(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        InvalidRequestError: reason TLS_FILE_UNREADABLE.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequestError(
            "TLS_FILE_UNREADABLE", f"cannot read {path} for TLS: {error.strerror}", path=path
        ) from None


def files_signature(paths: tuple[Path | None, ...]) -> FileSignature:
    """Tells files from others that are put in their place, and from themselves changed."""
    return tuple(None if path is None else _signature(path) for path in paths)


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _context(*, is_server: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    return context


def _load_anchors(context: ssl.SSLContext, path: Path) -> None:
    try:
        context.load_verify_locations(cafile=path)
    except ssl.SSLError as error:
        raise InvalidRequestError(
            "TLS_CERTIFICATE_MALFORMED",
            f"{path} is no PEM file of certificates ({_word(error)})",
            path=path,
        ) from None


def _load_pair(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    def refuse_to_ask() -> NoReturn:
        # Without this the library asks on the terminal, and a service would wait there for ever.
        raise InvalidRequestError(
            "TLS_KEY_ENCRYPTED",
            f"the key in {key} is encrypted, and nobody is asked for its passphrase; store it "
            "without one",
            path=key,
        )

    try:
        context.load_cert_chain(cert, key, password=refuse_to_ask)
    except ssl.SSLError as error:
        if error.reason in _MISMATCHES:
            raise InvalidRequestError(
                "TLS_KEY_MISMATCH",
                f"the key in {key} is not that of the certificate in {cert}",
                path=key,
                certificate=cert,
            ) from None
        raise InvalidRequestError(
            "TLS_KEY_MALFORMED", f"{key} is no PEM file of a key ({_word(error)})", path=key
        ) from None


def _shown_certificate(
    showing: ssl.SSLContext, trusting: ssl.SSLContext, cert: Path, *, is_server: bool
) -> dict[str, Any]:
    """What the trusting side sees of the certificate when both meet."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    shower = showing.wrap_bio(there, back, server_side=is_server)
    truster = trusting.wrap_bio(back, there, server_side=not is_server)
    caller, called = (truster, shower) if is_server else (shower, truster)
    try:
        for _ in range(_NUM_FLIGHTS_MAX):
            if all([_is_done(caller), _is_done(called)]):
                break
    except ssl.SSLError as error:
        raise InvalidRequestError(
            "TLS_CERTIFICATE_UNUSABLE",
            f"no {'caller' if is_server else 'server'} could accept the certificate in {cert}: "
            f"{_word(error)}",
            path=cert,
        ) from None
    return dict(truster.getpeercert() or {})


def _is_done(side: ssl.SSLObject) -> bool:
    try:
        side.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True


def _check_time(cert: Path, seen: dict[str, Any]) -> None:
    now_s = time.time()
    if ssl.cert_time_to_seconds(str(seen["notAfter"])) <= now_s:
        raise _expired(cert, str(seen["notAfter"]))
    if ssl.cert_time_to_seconds(str(seen["notBefore"])) > now_s:
        raise InvalidRequestError(
            "TLS_CERTIFICATE_NOT_YET_VALID",
            f"the certificate in {cert} is valid from {seen['notBefore']} only",
            path=cert,
            not_before=seen["notBefore"],
        )


def _expired(path: Path, not_after: str) -> InvalidRequestError:
    return InvalidRequestError(
        "TLS_CERTIFICATE_EXPIRED",
        f"the certificate in {path} has expired on {not_after}",
        path=path,
        not_after=not_after,
    )


def _word(error: ssl.SSLError) -> str:
    """What the library says, without the place in its source."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return str(error.verify_message)
    return str(error.reason or error).lower().replace("_", " ")
