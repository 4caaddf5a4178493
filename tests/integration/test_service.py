"""The standard faces of a gRPC service: health, reflection, and a drain that loses nothing."""

import signal
from collections.abc import Callable
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from integration.system import PATIENCE_S, System, eventually, refusal
from pageframe.client import GenerationRequest
from pageframe.v1.gateway_service_pb2 import GenerateRequest, TokenIds
from pageframe.v1.sequence_pb2 import SamplingParameters

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def health(channel: grpc.Channel, service: str) -> int:
    request = health_pb2.HealthCheckRequest(service=service)
    return health_pb2_grpc.HealthStub(channel).Check(request, timeout=PATIENCE_S).status


def offered(channel: grpc.Channel) -> set[str]:
    """Service names, as reflection lists them."""
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    (response,) = stub.ServerReflectionInfo(iter([request]), timeout=PATIENCE_S)
    return {service.name for service in response.list_services_response.service}


def test_every_service_tells_its_health_and_its_methods(slow_system: System) -> None:
    services = {
        slow_system.gateway_channel: {"GatewayService"},
        slow_system.scheduler_channel: {"SchedulerService"},
        slow_system.executor_channel: {"ExecutorService", "KvMemoryService"},
    }
    for channel, short_names in services.items():
        names = {f"pageframe.v1.{name}" for name in short_names}
        standard = {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
        assert offered(channel) == names | standard
        for name in ("", *names):
            assert health(channel, name) == SERVING
    assert refusal_code(lambda: health(slow_system.gateway_channel, "nobody's")) is (
        grpc.StatusCode.NOT_FOUND
    )


def refusal_code(call: Callable[[], object]) -> grpc.StatusCode:
    try:
        call()
    except grpc.RpcError as error:
        return error.code()
    raise AssertionError("not refused")


def test_reflection_describes_what_it_lists(slow_system: System) -> None:
    request = reflection_pb2.ServerReflectionRequest(
        file_containing_symbol="pageframe.v1.GatewayService"
    )
    stub = reflection_pb2_grpc.ServerReflectionStub(slow_system.gateway_channel)
    (response,) = stub.ServerReflectionInfo(iter([request]), timeout=PATIENCE_S)
    files = response.file_descriptor_response.file_descriptor_proto
    assert any(b"GenerateRequest" in file for file in files)


def test_a_drain_ends_what_runs_and_refuses_what_comes(
    start: Callable[..., System], sim_model: Path
) -> None:
    system = start(sim_model, "--sim-step", "10ms")
    request = GenerateRequest(
        token_ids=TokenIds(ids=[3, 4]), sampling=SamplingParameters(max_tokens=100, seed=1)
    )
    messages: list[object] = []
    with system.stream(request) as stream:
        messages += [next(stream), next(stream)]
        system.process.send_signal(signal.SIGTERM)
        eventually(lambda: health(system.gateway_channel, "") == NOT_SERVING, "it drains")
        refused = refusal(lambda: system.generate(request))
        assert refused[:2] == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert health(system.scheduler_channel, "") == SERVING, "it is needed to the end"
        messages += stream
    num_tokens = sum(len(message.delta.token_ids) for message in messages)
    assert num_tokens == 100, "what ran was let run"
    assert messages[-1].HasField("completion")
    system.wait_ended()
    ended = [span for span in system.spans() if span.name in ("generate", "kv.free")]
    assert {span.name for span in ended} == {"generate", "kv.free"}, "the trace is drained last"


def test_a_second_signal_does_not_wait(start: Callable[..., System], sim_model: Path) -> None:
    system = start(sim_model, "--sim-step", "10s")
    with system.client() as client:
        events = client.generate(GenerationRequest(token_ids=[3], max_tokens=5))
        next(events)
        system.process.send_signal(signal.SIGINT)
        eventually(lambda: health(system.gateway_channel, "") == NOT_SERVING, "it drains")
        system.process.send_signal(signal.SIGINT)
        assert system.process.wait(PATIENCE_S) == 130
        events.close()
    system.wait_gone()
