"""The compose files, the Dockerfile and what they build from, read without Docker."""

import importlib.util
import json
import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[3]
DOCKERFILE = (REPOSITORY / "docker" / "Dockerfile").read_text()
OWN_SERVICES = ("gateway", "scheduler", "executor")


def load(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((REPOSITORY / name).read_text()))


COMPOSE = load("docker-compose.yml")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "docker" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_everything_is_published_on_loopback_alone_and_the_executor_not_at_all():
    published = {name: service.get("ports", []) for name, service in SERVICES.items()}
    assert {name for name, ports in published.items() if ports} == {
        *("gateway", "jaeger", "prometheus", "grafana")
    }
    ports = [port for each in published.values() for port in each]
    assert all(port.startswith("127.0.0.1:") for port in ports), ports


@pytest.mark.parametrize("name", OWN_SERVICES)
def test_own_services_are_confined_bounded_and_come_back(name):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["restart"] == "unless-stopped"
    assert {"mem_limit", "pids_limit", "stop_grace_period"} <= set(service)
    assert service["build"]["target"] == name


def test_the_grace_period_is_longer_than_draining_takes():
    from pageframe.cli import services
    from pageframe.config.settings import Settings

    drain_s = Settings().drain_timeout_seconds + services._STOP_GRACE_SECONDS
    drain_s += services._EXPORTER_DRAIN_SECONDS
    for name in OWN_SERVICES:
        assert int(SERVICES[name]["stop_grace_period"].removesuffix("s")) >= drain_s


def test_every_image_that_is_pulled_is_pinned_to_a_version():
    pulled = [service["image"] for service in SERVICES.values() if "build" not in service]
    assert len(pulled) == 3
    assert all(re.search(r":v?\d+\.\d+\.\d+$", image) for image in pulled), pulled


def test_only_the_metrics_wait_to_be_asked_for():
    asked = {name for name, service in SERVICES.items() if service.get("profiles") == ["metrics"]}
    assert asked == {"prometheus", "grafana"}


def test_every_volume_is_declared_and_every_file_is_there():
    for name, service in SERVICES.items():
        for volume in service.get("volumes", []):
            source = re.sub(r"\$\{\w+:-(\w+)\}", r"\1", volume).split(":")[0]
            if source.startswith("."):
                assert (REPOSITORY / source).exists(), (name, source)
            else:
                assert source in COMPOSE["volumes"], (name, source)


def test_services_meet_where_they_listen():
    """Host names are those of the compose file, ports those of the images."""
    listens = {name: set(re.findall(r"0\.0\.0\.0:(\d+)", stage(name))) for name in OWN_SERVICES}
    assert listens["gateway"] == {"50051", "8000"}
    calls = (("gateway", "scheduler"), ("gateway", "executor"), ("scheduler", "executor"))
    for caller, option in calls:
        (called,) = re.findall(rf'"--{option}", "([\w:.]+)"', stage(caller))
        host, port = called.split(":")
        assert host == option
        assert listens[host] == {port}
    for name in OWN_SERVICES:
        (checked,) = re.findall(r'"pageframe.cli.health", "127.0.0.1:(\d+)"', stage(name))
        assert checked in listens[name]


def stage(name: str) -> str:
    """The lines of one stage of the Dockerfile."""
    _, _, rest = DOCKERFILE.partition(f" AS {name}\n")
    assert rest, name
    return rest.partition("\nFROM ")[0]


def test_prometheus_asks_every_service_where_it_tells():
    from pageframe.config.settings import METERED_SERVICES, Settings

    (job,) = load("docker/prometheus.yml")["scrape_configs"]
    targets = [f"{name}:{Settings().metrics_port_of(name)}" for name in METERED_SERVICES]
    assert job["static_configs"] == [{"targets": targets}]


def test_spans_go_where_jaeger_listens():
    endpoint = SERVICES["gateway"]["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"]
    jaeger = load("docker/jaeger.yaml")
    assert endpoint.endswith("http://jaeger:4317}")
    assert jaeger["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"].endswith(":4317")
    storage = jaeger["extensions"]["jaeger_storage"]["backends"]["kept"]["badger"]
    assert all(path.startswith("/badger/") for path in storage["directories"].values())
    assert "jaeger-storage:/badger" in SERVICES["jaeger"]["volumes"]


def test_grafana_finds_the_dashboard():
    (provider,) = load("docker/grafana/dashboards.yml")["providers"]
    mounts = dict(volume.split(":")[:2] for volume in SERVICES["grafana"]["volumes"])
    assert mounts["./docs/grafana"] == provider["options"]["path"]
    assert json.loads((REPOSITORY / "docs/grafana/pageframe.json").read_text())["uid"]


def test_grafana_knows_how_often_prometheus_scrapes():
    (source,) = load("docker/grafana/datasource.yml")["datasources"]
    scrapes = load("docker/prometheus.yml")["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scrapes


def test_without_a_gpu_only_the_executor_is_another():
    override = load("docker-compose.cpu.yml")["services"]
    assert set(override) == {"executor"}
    assert override["executor"]["runtime"] == "runc"
    assert SERVICES["executor"]["runtime"] == "nvidia"
    assert override["executor"]["image"] != SERVICES["executor"]["image"]


def test_every_variable_of_ours_is_a_setting_or_is_used_by_compose_alone():
    """A variable that no service knows would keep it from starting."""
    from pageframe.config.settings import OPTION_FIELDS, OTHER_VARIABLES, variable_name

    known = {variable_name(option) for option in OPTION_FIELDS} | OTHER_VARIABLES
    given = {name for service in SERVICES.values() for name in service.get("environment", {})}
    given |= set(re.findall(r"\b(PAGEFRAME_[A-Z_]+)=", DOCKERFILE))
    ours = {name for name in given if name.startswith("PAGEFRAME_")}
    assert len(ours) > 8
    assert ours <= known


def test_images_install_what_the_project_declares():
    requirements = script("requirements")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    images = {
        image: {
            re.split(r"[<>=\[]", line)[0] for line in requirements.requirements(project, extras)
        }
        for image, extras in requirements.EXTRAS_BY_IMAGE.items()
    }
    assert {"tokenizers", "starlette", "typer"} <= images["gateway"]
    assert {"torch", "transformers", "gguf"} <= images["executor-cpu"]
    assert images["executor-cuda"] - images["executor-cpu"] == {"triton"}
    assert not {"torch", "transformers", "triton", "pageframe"} & (
        images["gateway"] | images["common"]
    )


def test_the_builder_is_sent_only_what_it_uses():
    """A path that is copied and not let through breaks the build; what is not copied stays out."""
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    let_through = {line[1:] for line in lines if line.startswith("!")}
    copies = re.findall(r"^COPY ((?!--from)\S.*)$", DOCKERFILE, re.M)
    sources = {word for line in copies for word in line.split()[:-1]}
    assert sources
    assert all(any(s == p or s.startswith(p + "/") for p in let_through) for s in sources)
    assert all(any(s == p or s.startswith(p + "/") for s in sources) for p in let_through)
