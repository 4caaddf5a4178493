"""One service alone: what it must be told, and what it is then told."""

import os
from pathlib import Path

import pytest

from pageframe.cli.main import main
from pageframe.cli.serve import Addresses, ServiceName, make_launch, run_serve
from pageframe.cli.services import EXPORTER, specs_apart
from pageframe.config.settings import Settings, load_settings
from pageframe.core.errors import InvalidRequestError
from pageframe.telemetry.__main__ import parse_arguments

LISTEN, EXECUTOR, SCHEDULER = "0.0.0.0:50052", "executor:50053", "scheduler:50052"
COMPLETE = {
    ServiceName.GATEWAY: Addresses(scheduler=SCHEDULER),
    ServiceName.SCHEDULER: Addresses(listen=LISTEN, executor=EXECUTOR),
    ServiceName.EXECUTOR: Addresses(listen=LISTEN),
}


class NoConsole:
    def say(self, line: str) -> None:
        raise AssertionError(line)


@pytest.mark.parametrize("service", list(ServiceName))
def test_the_addresses_that_a_service_needs_are_enough(service):
    COMPLETE[service].check(service)


@pytest.mark.parametrize(
    ("service", "addresses", "reason", "option"),
    [
        (ServiceName.GATEWAY, Addresses(), "ADDRESS_MISSING", "--scheduler"),
        (ServiceName.SCHEDULER, Addresses(listen=LISTEN), "ADDRESS_MISSING", "--executor"),
        (ServiceName.EXECUTOR, Addresses(), "ADDRESS_MISSING", "--listen"),
        (
            ServiceName.EXECUTOR,
            Addresses(listen=LISTEN, scheduler=SCHEDULER),
            "ADDRESS_UNWANTED",
            "--scheduler",
        ),
        (ServiceName.EXECUTOR, Addresses(listen="50053"), "SETTING_MALFORMED", "--listen"),
        (ServiceName.GATEWAY, Addresses(scheduler="a:1,b"), "SETTING_MALFORMED", "--scheduler"),
        (
            ServiceName.GATEWAY,
            Addresses(scheduler="a:1", executor="a:1,b"),
            "SETTING_MALFORMED",
            "--executor",
        ),
        (
            ServiceName.SCHEDULER,
            Addresses(listen=LISTEN, executor="a:1,b:1"),
            "SETTING_MALFORMED",
            "--executor",
        ),
    ],
)
def test_other_addresses_are_refused_by_the_option(service, addresses, reason, option):
    with pytest.raises(InvalidRequestError) as caught:
        addresses.check(service)
    assert caught.value.reason == reason
    assert option in caught.value.message


def test_a_refusal_comes_before_anything_is_made(tmp_path):
    state_dir = tmp_path / "state"
    settings = load_settings({"state-dir": str(state_dir)}, {})
    with pytest.raises(InvalidRequestError):
        run_serve(ServiceName.GATEWAY, Addresses(), settings, {}, NoConsole())
    assert not state_dir.exists()


def launch_of(service: ServiceName, folder: Path):
    return make_launch(service, COMPLETE[service], Settings(), {}, Path(), folder)


def test_a_scheduler_listens_at_its_own_address_and_calls_the_other(tmp_path):
    launch = launch_of(ServiceName.SCHEDULER, tmp_path)
    assert (launch.scheduler_address, launch.executor_address) == (LISTEN, EXECUTOR)


def test_a_gateway_may_have_several_schedulers_and_executors_to_ask(tmp_path):
    executors = "one:50053,dns:///executors:50053"
    addresses = Addresses(scheduler="one:50052,two:50052", executor=executors)
    addresses.check(ServiceName.GATEWAY)
    launch = make_launch(ServiceName.GATEWAY, addresses, Settings(), {}, Path(), tmp_path)
    assert launch.scheduler_targets == ("one:50052", "two:50052")
    assert launch.executor_targets == ("one:50053", "dns:///executors:50053")


def test_an_executor_listens_and_a_gateway_calls(tmp_path):
    assert launch_of(ServiceName.EXECUTOR, tmp_path).executor_address == LISTEN
    assert launch_of(ServiceName.GATEWAY, tmp_path).scheduler_address == SCHEDULER


def test_the_exporter_beside_a_service_reads_its_ring_alone(tmp_path):
    launch = launch_of(ServiceName.SCHEDULER, tmp_path)
    service, exporter = specs_apart("scheduler", launch, tmp_path / "launch.json", os.environ)
    assert (service.name, exporter.name) == ("scheduler", EXPORTER)
    place = exporter.argv.index("pageframe.telemetry") + 1
    assert parse_arguments(exporter.argv[place:]).ring == [launch.ring_path("scheduler")]


def test_without_traces_there_is_no_exporter(tmp_path):
    settings = load_settings({"trace": "off"}, {})
    launch = make_launch(
        ServiceName.GATEWAY, COMPLETE[ServiceName.GATEWAY], settings, {}, Path(), tmp_path
    )
    specs = specs_apart("gateway", launch, tmp_path / "launch.json", {})
    assert [spec.name for spec in specs] == ["gateway"]


def test_the_command_names_what_is_missing(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PAGEFRAME_STATE_DIR", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        main(["serve", "scheduler", "--listen", LISTEN, "--lookahead", "off"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "pageframe: serve scheduler needs --executor HOST:PORT\n"
