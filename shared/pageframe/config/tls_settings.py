"""Settings of TLS and of the connections between services."""

from typing import TYPE_CHECKING

from pydantic import Field

from pageframe.config.option_types import OptionalFile, Seconds, SettingsGroup
from pageframe.core.errors import InvalidRequestError
from pageframe.rpc.keepalive import Keepalive

# gRPC is imported late: a supervisor without TLS has nothing to do with it.
if TYPE_CHECKING:
    from pageframe.rpc.channel import InnerChannels
    from pageframe.rpc.tls import ClientTls, ServerTls


class TlsSettings(SettingsGroup):
    """What a service shows and asks for over TCP. Unix sockets need none of it."""

    tls_cert: OptionalFile = Field(
        None,
        description='PEM file of the certificate that a service shows to its callers, or "off".',
    )
    tls_key: OptionalFile = Field(None, description="PEM file of its key, not encrypted.")
    tls_client_ca: OptionalFile = Field(
        None,
        description="PEM file of the CAs whose certificates callers must show (mutual TLS), or "
        '"off".',
    )
    tls_peer_ca: OptionalFile = Field(
        None,
        description="PEM file of the CAs by which the services that are called are known; with "
        'it they are called over TLS. Or "off".',
    )
    tls_peer_cert: OptionalFile = Field(
        None,
        description="PEM file of the certificate to show to them; tls-cert unless given.",
    )
    tls_peer_key: OptionalFile = Field(None, description="PEM file of its key.")
    tls_peer_name: str = Field(
        "",
        max_length=253,
        description="Name that their certificates carry; the host of their address unless given.",
    )
    peer_timeout_seconds: Seconds = Field(
        15.0,
        ge=1,
        le=3600,
        allow_inf_nan=False,
        description='Time after which a service that is silent is taken to be lost ("15s").',
    )

    def server_tls(self) -> "ServerTls | None":
        """What this service serves with; None for plain text.

        Raises:
            InvalidRequestError: reason TLS_PAIR_INCOMPLETE.
        """
        if not (self.tls_cert or self.tls_key or self.tls_client_ca):
            return None
        from pageframe.rpc.tls import make_server_tls

        return make_server_tls(self.tls_cert, self.tls_key, self.tls_client_ca)

    def client_tls(self) -> "ClientTls | None":
        """What this service calls others with; None for plain text.

        Raises:
            InvalidRequestError: reason TLS_PAIR_INCOMPLETE or TLS_CA_MISSING.
        """
        cert, key = self.tls_peer_cert, self.tls_peer_key
        if self.tls_peer_ca is None:
            if cert or key or self.tls_peer_name:
                raise InvalidRequestError(
                    "TLS_CA_MISSING",
                    "tls-peer-cert, tls-peer-key and tls-peer-name are of use with tls-peer-ca "
                    "only: without it other services are called in plain text",
                )
            return None
        if cert is None and key is None:
            cert, key = self.tls_cert, self.tls_key
        from pageframe.rpc.tls import make_client_tls

        return make_client_tls(ca=self.tls_peer_ca, cert=cert, key=key, name=self.tls_peer_name)

    def keepalive(self) -> Keepalive:
        """How soon a peer that has vanished is noticed."""
        return Keepalive(notice_ms=round(self.peer_timeout_seconds * 1000))

    def inner_channels(self) -> "InnerChannels":
        """How other services are called.

        Raises:
            InvalidRequestError: as ``client_tls``.
        """
        from pageframe.rpc.channel import InnerChannels

        return InnerChannels(tls=self.client_tls(), keepalive=self.keepalive())

    def check_tls(self) -> None:
        """Read all files that the settings name, before anything is started.

        Raises:
            InvalidRequestError: what is wrong with which file.
        """
        if (server := self.server_tls()) is not None:
            server.read()
        if (client := self.client_tls()) is not None:
            client.credentials()
