"""The compose file as users run it: real containers of real images, on a machine without a GPU.

Tests run in the order of the file and share one stack; the last one takes it down.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from compose.docker_host import (
    DockerUnavailableError,
    daemon,
    eventually,
    has_cpu_torch,
    install_docker,
    make_base_image,
    pip_places,
    run,
)
from compose.stack import CPU_FILES, PROJECT, REPOSITORY, SERVICES, Phases, Stack
from pageframe.client import Delta, GenerationRequest, GenerationResult, PageframeClient
from pageframe.config import install
from pageframe.kernels.cpu.build import best_isa

pytestmark = [pytest.mark.compose, pytest.mark.timeout(3600)]

PROMPT = "The capital of France is"
GENERATE_S = 180.0
SPANS_S = 60.0
USER_ID = "10001"
SLIM_SERVICES = ("gateway", "scheduler")


@pytest.fixture(scope="module")
def phases(request: pytest.FixtureRequest) -> Iterator[Phases]:
    phases = Phases()
    yield phases
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("\n" + "\n".join(phases.lines()))


@pytest.fixture(scope="module")
def docker(request: pytest.FixtureRequest, phases: Phases) -> Iterator[None]:
    """Docker, or a skip that nobody overlooks."""
    try:
        with phases.phase("install Docker"):
            install_docker()
        started = daemon()
        with phases.phase("start dockerd"):
            started.__enter__()
    except DockerUnavailableError as error:
        capture = request.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            print(f"\n\n!!! THE COMPOSE FILE IS NOT TESTED: Docker cannot run here: {error}\n")
        pytest.skip(f"Docker cannot run here: {error}")
    try:
        yield
    finally:
        with phases.phase("stop dockerd"):
            started.__exit__(None, None, None)


@pytest.fixture(scope="module")
def stack(docker: None, phases: Phases) -> Iterator[Stack]:
    """The stack, built and started; whatever happens, nothing is left of it."""
    with phases.phase("base image"):
        make_base_image()
    stack = Stack(prepared_models(), torch_index(), best_isa().name)
    stack.down()
    # One after the other: the executor's is the last in the file, and has all stages behind it.
    for service in ("gateway", "scheduler", "executor"):
        with phases.phase(f"build {service}"):
            stack.build(service)
    try:
        with phases.phase("up"):
            stack.up()
        with phases.phase("healthy"):
            stack.wait_healthy(*SERVICES)
        yield stack
    finally:
        with phases.phase("clean up"):
            stack.down()


def prepared_models() -> Path:
    """The folder of this machine's prepared models, with the embedded one in it."""
    last = run("pageframe", "model", "prepare", "smollm2-135m-instruct", timeout_s=600)
    return Path(last.splitlines()[-1]).parent


def torch_index() -> str:
    """Where PyTorch's CPU build is, unless pip's own configuration has it."""
    version = install.pinned_torch((REPOSITORY / "constraints.txt").read_text())
    places = pip_places(run("pip", "config", "list", timeout_s=60))
    return "" if has_cpu_torch(places, version) else install.TORCH_CPU_INDEX


def generate(stack: Stack, max_tokens: int = 16) -> GenerationResult:
    request = GenerationRequest(prompt=PROMPT, temperature=0.0, max_tokens=max_tokens)
    with PageframeClient(stack.grpc_address) as client:
        return client.complete(request, timeout_s=GENERATE_S)


@pytest.mark.parametrize("files", [CPU_FILES[:1], CPU_FILES], ids=["gpu", "cpu"])
def test_old_docker_compose_takes_the_files(docker: None, files: tuple[str, ...]) -> None:
    words = [word for name in files for word in ("-f", name)]
    told = run("docker-compose", *words, "config", timeout_s=60, cwd=REPOSITORY)
    assert f"runtime: {'nvidia' if len(files) == 1 else 'runc'}" in told
    assert "TORCH: " + ("cuda" if len(files) == 1 else "cpu") in told


def test_it_generates_over_grpc_and_http(stack: Stack, phases: Phases) -> None:
    with phases.phase("generate"):
        sample = generate(stack).samples[0]
    assert "Paris" in sample.text
    assert len(sample.token_ids) == 16
    completion = stack.post(
        "/v1/completions",
        {"model": "smollm2-135m-instruct", "prompt": PROMPT, "max_tokens": 16, "temperature": 0},
    )
    assert completion["choices"][0]["text"] == sample.text
    assert completion["usage"]["completion_tokens"] == 16


def test_commands_inside_a_container_find_their_service(stack: Stack) -> None:
    told = stack.inside(
        "gateway", "pageframe", "generate", "--max-tokens", "2", "--temperature", "0", PROMPT
    )
    assert "Paris" in told
    assert "blocks of 16 tokens" in stack.inside("executor", "pageframe", "pool")


def test_the_executor_computes_with_compiled_kernels(stack: Stack) -> None:
    assert "pageframe ready service=executor grpc=0.0.0.0:50053 kernels=fused" in stack.compose(
        "logs", "--no-color", "executor"
    )


@pytest.mark.parametrize("service", SERVICES)
def test_a_container_can_harm_little(stack: Stack, service: str) -> None:
    """Another user than root, without capabilities, on a file system that cannot be written."""
    script = (
        "id -u; touch /opt/pageframe/x 2>&1; touch /tmp/x && echo wrote; grep CapEff /proc/1/status"
    )
    said = stack.inside(service, "sh", "-c", script).split("\n")
    assert said[0] == USER_ID
    assert "Read-only file system" in said[1]
    assert said[2] == "wrote"
    assert int(said[3].split()[1], 16) == 0


@pytest.mark.parametrize("service", SLIM_SERVICES)
def test_slim_images_are_without_torch(stack: Stack, service: str) -> None:
    script = "import importlib.util as u; print(u.find_spec('grpc') and u.find_spec('torch'))"
    assert stack.inside(service, "python", "-c", script).strip() == "None"


def test_only_the_gateway_is_published_and_on_loopback_alone(stack: Stack) -> None:
    published = {
        service: stack.container(service)["NetworkSettings"]["Ports"] for service in SERVICES
    }
    for service, ports in published.items():
        bound = {name: hosts for name, hosts in ports.items() if hosts}
        assert set(bound) == ({"50051/tcp", "8000/tcp"} if service == "gateway" else set())
        assert all(host["HostIp"] == "127.0.0.1" for hosts in bound.values() for host in hosts)


@pytest.mark.parametrize(
    ("service", "port", "metric"),
    [
        ("gateway", 9464, "pageframe_requests_total"),
        ("scheduler", 9465, "pageframe_sequences"),
        ("executor", 9466, "pageframe_blocks"),
    ],
)
def test_metrics_are_told_where_prometheus_asks(
    stack: Stack, service: str, port: int, metric: str
) -> None:
    assert f'"{service}:{port}"' in (REPOSITORY / "docker/prometheus.yml").read_text()
    url = f"http://{service}:{port}/metrics"
    script = f"import urllib.request as r; print(r.urlopen('{url}').read().decode())"
    assert f"\n{metric}" in stack.inside("scheduler", "python", "-c", script)


def test_a_request_is_one_trace_over_three_services(stack: Stack, phases: Phases) -> None:
    result = generate(stack, max_tokens=24)
    trace_id = result.started.trace_id
    wanted = {f"pageframe-{service}" for service in SERVICES}

    def told() -> str:
        return str(sorted({(span["service"], span["name"]) for span in stack.spans(trace_id)}))

    def is_whole() -> bool:
        spans = stack.spans(trace_id)
        known = {span["span"] for span in spans}
        services = {span["service"] for span in spans}
        # A span's parent may come later, from another service's exporter.
        return services == wanted and all(not s["parent"] or s["parent"] in known for s in spans)

    with phases.phase("trace arrives"):
        eventually(is_whole, told, SPANS_S)
    spans = stack.spans(trace_id)
    assert [span["name"] for span in spans if not span["parent"]] == ["generate"]
    allocated = [span for span in spans if span["name"] == "kv.allocate"]
    # 29 tokens are two blocks of 16.
    num_blocks = result.samples[0].account.num_blocks_peak
    assert num_blocks >= 2
    assert allocated, told()
    assert all(span["service"] == "pageframe-executor" for span in allocated)


def test_a_killed_executor_comes_back_and_nothing_is_lost(stack: Stack, phases: Phases) -> None:
    """The first process of the container is killed, as the kernel does when memory runs out."""
    undisturbed = generate(stack, max_tokens=200).samples[0]
    before = stack.container("executor")
    with PageframeClient(stack.grpc_address) as client:
        request = GenerationRequest(prompt=PROMPT, temperature=0.0, max_tokens=200)
        token_ids: list[int] = []
        for event in client.generate(request, timeout_s=GENERATE_S):
            if isinstance(event, Delta):
                if not token_ids:
                    os.kill(before["State"]["Pid"], signal.SIGKILL)
                token_ids += event.token_ids
    assert token_ids == undisturbed.token_ids
    with phases.phase("executor is healthy again"):
        stack.wait_healthy(*SERVICES)
    after = stack.container("executor")
    assert after["Id"] == before["Id"]
    assert after["RestartCount"] == before["RestartCount"] + 1
    assert generate(stack, max_tokens=200).samples[0].token_ids == undisturbed.token_ids


def test_nothing_is_left_of_it(stack: Stack, phases: Phases) -> None:
    with phases.phase("down"):
        stack.down()
    ours = f"label=com.docker.compose.project={PROJECT}"
    for command in (("ps", "--all"), ("volume", "ls"), ("network", "ls")):
        assert run("docker", *command, "--quiet", "--filter", ours, timeout_s=60) == ""
