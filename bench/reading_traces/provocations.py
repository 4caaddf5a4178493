"""Five ways to make somebody wait, each on a system of its own, on the simulated runner.

Two tenants share it: *alice* was there first, *bob* comes while she runs. Steps take 4 ms each, so
what is seen is scheduling, not arithmetic, and the picture is the same on any machine.
"""

import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil

from bench.chaos.system import System
from pageframe.client import GenerationRequest, PageframeClient
from pageframe.client.types import Delta
from pageframe.rpc.channel import INNER_OPTIONS
from pageframe.telemetry import spans as names
from pageframe.telemetry.reader import Span, join_parts, read_spans
from pageframe.v1 import scheduler_service_pb2, scheduler_service_pb2_grpc

ALICE, BOB = "alice", "bob"
PATIENCE_S = 120.0
_COMMON = ("--sim-step", "4ms", "--trace", "audit", "--block-size", "16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What the two do.

    Attributes:
        system: The running system.
        alice: Her request; begins first.
        bob: His request; begins when she has her first token, or at once.
    """

    system: System
    alice: GenerationRequest
    bob: GenerationRequest

    def play(self, *, bob_comes_at: int = 1, at_token: Callable[[int], None] | None = None) -> None:
        """Run both to their ends.

        Args:
            bob_comes_at: After so many of alice's tokens; 0 is as soon as she was let in.
            at_token: Told how many tokens alice has, at each of them.
        """
        is_time = threading.Event()
        failures: list[BaseException] = []

        def run_alice() -> None:
            num_tokens = 0
            try:
                for event in self._generate(ALICE, self.alice):
                    num_tokens += len(event.token_ids) if isinstance(event, Delta) else 0
                    if num_tokens >= bob_comes_at:
                        is_time.set()
                    if at_token is not None:
                        at_token(num_tokens)
            except BaseException as error:
                failures.append(error)
            finally:
                is_time.set()

        thread = threading.Thread(target=run_alice)
        thread.start()
        try:
            assert is_time.wait(PATIENCE_S), "alice never got that far"
            if not bob_comes_at:
                self._wait_computing()
            for _ in self._generate(BOB, self.bob):
                pass
        finally:
            thread.join()
        if failures:
            raise failures[0]

    def _wait_computing(self) -> None:
        """Wait until alice's prompt is being computed, if it is not yet."""
        deadline_s = time.monotonic() + PATIENCE_S
        address = self.system.scheduler_address
        with grpc.insecure_channel(address, options=INNER_OPTIONS) as channel:
            scheduler = scheduler_service_pb2_grpc.SchedulerServiceStub(channel)
            while time.monotonic() < deadline_s:
                books = scheduler.Snapshot(
                    scheduler_service_pb2.SnapshotRequest(), timeout=PATIENCE_S
                )
                if any(entry.num_computed_tokens for entry in books.sequences):
                    return
        raise TimeoutError("alice's prompt is not computed")

    def _generate(self, tenant: str, request: GenerationRequest) -> Iterator[object]:
        with PageframeClient(self.system.address, api_key=_key_of(tenant)) as client:
            yield from client.generate(request, timeout_s=PATIENCE_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class Provocation:
    """One stall on purpose.

    Attributes:
        name: Also that of its picture, ``docs/images/trace-<name>.svg``.
        title: Of the picture.
        cause: Value of ``pageframe.stall.cause``.
        options: What ``pageframe up`` is given beside what all have in common.
        requests: Tokens of the prompt and of the output, alice's and bob's.
        victim: Whose request waits.
        culprit: Who the stall's link leads to; empty where nobody's request is behind it.
        play: What happens.
    """

    name: str
    title: str
    cause: str
    options: tuple[str, ...]
    requests: tuple[tuple[int, int], tuple[int, int]]
    victim: str
    culprit: str
    play: Callable[[Scene], None]


def _bob_comes_later(scene: Scene) -> None:
    scene.play()


def _bob_comes_at_once(scene: Scene) -> None:
    scene.play(bob_comes_at=0)


def _the_executor_dies(scene: Scene) -> None:
    executor = scene.system.service("executor")

    def kill(num_tokens: int) -> None:
        if num_tokens >= 40:
            _kill_once(executor)

    scene.play(bob_comes_at=5, at_token=kill)


def _kill_once(process: psutil.Process) -> None:
    if process.is_running():
        process.kill()


PROVOCATIONS = (
    Provocation(
        name="pool-full",
        title="Pool full: bob's prompt needs 20 blocks, alice holds most of 24",
        cause="kv_full",
        options=("--num-blocks", "24"),
        requests=((160, 120), (310, 24)),
        victim=BOB,
        culprit=ALICE,
        play=_bob_comes_later,
    ),
    Provocation(
        name="budget",
        title="Token budget: alice's prompt takes all 32 tokens of every step",
        cause="token_budget",
        options=("--num-blocks", "256", "--token-budget", "32"),
        requests=((3_200, 24), (48, 24)),
        victim=BOB,
        culprit=ALICE,
        play=_bob_comes_at_once,
    ),
    Provocation(
        name="preempted",
        title="Preempted: both grow, the pool does not, and bob gives way to alice",
        cause="preempted",
        options=("--num-blocks", "24", "--recovery", "recompute"),
        requests=((112, 170), (112, 120)),
        victim=BOB,
        culprit=ALICE,
        play=_bob_comes_later,
    ),
    Provocation(
        name="swap-in",
        title="Swap-in: bob was swapped out for alice, and waits for his blocks to come back",
        cause="swap_in",
        options=("--num-blocks", "24", "--recovery", "swap", "--host-kv-memory", "64MiB"),
        requests=((112, 170), (112, 120)),
        victim=BOB,
        culprit=ALICE,
        play=_bob_comes_later,
    ),
    Provocation(
        name="executor-restart",
        title="Executor restart: all keys and values are lost, and computed again",
        cause="executor_lost",
        options=("--num-blocks", "64"),
        requests=((160, 120), (96, 80)),
        victim=ALICE,
        culprit="",
        play=_the_executor_dies,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a provocation left behind.

    Attributes:
        provocation: Which.
        spans: All of its system, with traces that were split put together.
    """

    provocation: Provocation
    spans: list[Span]

    def trace_of(self, tenant: str) -> list[Span]:
        """The spans of a tenant's request."""
        (trace_id,) = {
            span.trace_id
            for span in self.spans
            if span.name == names.GENERATE and span.attributes[names.TENANT] == tenant
        }
        return [span for span in self.spans if span.trace_id == trace_id]

    @property
    def stalls(self) -> list[Span]:
        """Those of the victim that were provoked, as Jaeger finds them: by the tags of a span."""
        wanted = {
            names.STALL_CAUSE: self.provocation.cause,
            names.TENANT: self.provocation.victim,
        }
        return [
            span
            for span in self.spans
            if span.name == names.STALL and wanted.items() <= span.attributes.items()
        ]


def provoke(provocation: Provocation, model: str, keep: Path | None = None) -> Outcome:
    """Start a system, let it happen, end the system and read what was traced.

    Args:
        provocation: What.
        model: A prepared model's folder; only its config and tokenizer are read.
        keep: State folder to leave behind; None for one that goes away.
    """
    with _folder(keep) as folder:
        keys = folder / "keys.txt"
        keys.write_text("".join(f"{_key_of(tenant)} {tenant}\n" for tenant in (ALICE, BOB)))
        keys.chmod(0o600)
        options = (*_COMMON, "--api-keys", str(keys), *provocation.options)
        with System(folder, model, "sim", options) as system:
            requests = [
                GenerationRequest(
                    # No prompt begins like another, so nothing is shared.
                    token_ids=[7 + 2 * place] * num_prompt_tokens,
                    max_tokens=num_output_tokens,
                    ignore_eos=True,
                    request_id=tenant,
                )
                for place, (tenant, (num_prompt_tokens, num_output_tokens)) in enumerate(
                    zip((ALICE, BOB), provocation.requests, strict=True)
                )
            ]
            alice, bob = requests
            provocation.play(Scene(system=system, alice=alice, bob=bob))
        return Outcome(provocation=provocation, spans=join_parts(read_spans(folder / "traces")))


def find(name: str) -> Provocation:
    """The provocation of a name.

    Raises:
        KeyError: if there is none.
    """
    return {provocation.name: provocation for provocation in PROVOCATIONS}[name]


def command_of(provocation: Provocation) -> Sequence[str]:
    """What a person types to start such a system."""
    return ("pageframe", "up", "--runner", "sim", *_COMMON, *provocation.options)


def _key_of(tenant: str) -> str:
    return f"key-of-{tenant}"


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="pageframe-stall-") as name:
        yield Path(name)
