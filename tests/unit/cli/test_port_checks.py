"""Ports are tried before anything starts."""

import socket

import pytest

from pageframe.cli.checks import check_metrics_ports, check_port
from pageframe.config.settings import Settings
from pageframe.core.errors import PreconditionError

HOST = "127.0.77.1"
"""Nobody else's: the ports beside one that is taken are free here."""


@pytest.fixture
def taken():
    """A port that somebody else listens on."""
    with socket.socket() as holder:
        holder.bind((HOST, 0))
        holder.listen(1)
        yield holder.getsockname()[1]


def test_a_taken_http_port_is_named_with_the_way_out(taken):
    with pytest.raises(PreconditionError) as caught:
        check_port(f"{HOST}:{taken}", "http")
    assert caught.value.reason == "PORT_TAKEN"
    assert f"--http {HOST}:0" in caught.value.message


@pytest.mark.parametrize(("place", "service"), [(0, "gateway"), (1, "scheduler"), (2, "executor")])
def test_a_taken_metrics_port_is_named_with_its_service(taken, place, service):
    with pytest.raises(PreconditionError) as caught:
        check_metrics_ports(Settings(metrics_port=taken - place, metrics_host=HOST))
    assert caught.value.reason == "PORT_TAKEN"
    assert str(taken) in caught.value.message
    assert service in caught.value.message
    assert "--metrics-port" in caught.value.message


def test_metrics_ports_are_tried_on_the_address_that_is_set(taken):
    """Somebody else's port on one address is free on another."""
    with pytest.raises(PreconditionError) as caught:
        check_metrics_ports(Settings(metrics_port=taken, metrics_host="0.0.0.0"))
    assert f"{taken} on 0.0.0.0" in caught.value.message
    check_metrics_ports(Settings(metrics_port=taken, metrics_host="127.0.0.2"))


def test_no_port_is_tried_when_there_are_no_metrics(taken):
    check_metrics_ports(Settings(metrics_port=0))


def test_services_have_ports_in_a_row():
    settings = Settings(metrics_port=9000)
    ports = [settings.metrics_port_of(name) for name in ("gateway", "scheduler", "executor")]
    assert ports == [9000, 9001, 9002]
    assert Settings(metrics_port=0).metrics_port_of("executor") == 0
