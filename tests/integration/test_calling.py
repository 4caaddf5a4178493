"""The programs of `docs/calling.md` before a real system, from Python and from Node.

Node's libraries come from npm, at the versions of the lock file. Where there is no Node those tests
are skipped and say so; with `CALLING_NODE=required` that is a failure.
"""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from integration.system import PATIENCE_S, System, environment
from pageframe.client import GenerationRequest
from pageframe.client.types import Sample
from pageframe.rpc.status import ERROR_CLASSES
from pageframe.v1 import gateway_service_pb2, gateway_service_pb2_grpc

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "calling.md"
EXAMPLES = ROOT / "docs" / "calling"
KEY, TENANT = "key-of-atlas", "atlas"
NUM_TOKENS_BEFORE = 20

pytestmark = pytest.mark.slow


@dataclass(frozen=True, slots=True)
class Program:
    """One of the page's programs.

    Attributes:
        command: What starts it.
        variables: Environment variables that it needs.
    """

    command: tuple[str, ...]
    variables: dict[str, str]

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """Begin; what it prints can be read as it comes."""
        return subprocess.Popen(
            [*self.command, *arguments],
            env=environment(**self.variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str) -> list[dict]:
        """Everything that it prints; fails unless it ends well."""
        process = self.start(*arguments)
        told, complaints = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, complaints
        return [json.loads(line) for line in told.splitlines()]


def blocks(language: str) -> list[str]:
    """Code of the page in a language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)


def commands(word: str) -> list[str]:
    """Commands of the page in which a word stands; lines that go on are one."""
    lines = "".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [line for line in lines if word in line]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """The Node program with its libraries, in a folder of its own."""
    if missing := [name for name in ("node", "npm") if shutil.which(name) is None]:
        told = f"there is no {' and no '.join(missing)} here"
        if os.environ.get("CALLING_NODE") == "required":
            pytest.fail(told)
        pytest.skip(f"CALLING FROM NODE WAS NOT TESTED: {told}")
    folder = tmp_path_factory.mktemp("node")
    for file in (EXAMPLES / "node").iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    (command,) = commands("npm ci")
    installed = subprocess.run(
        [*shlex.split(command), "--prefer-offline"], cwd=folder, capture_output=True, text=True
    )
    assert installed.returncode == 0, installed.stderr
    return Program(("node", str(folder / "call.mjs")), {"PAGEFRAME_PROTOS": str(ROOT / "protos")})


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """The Python program, with stubs that the page's command has generated."""
    folder = tmp_path_factory.mktemp("stubs")
    (folder / "protos").symlink_to(ROOT / "protos")
    (command,) = commands("grpc_tools.protoc")
    python, *arguments = shlex.split(command)
    assert python == "python"
    (folder / "stubs").mkdir()
    subprocess.run([sys.executable, *arguments], cwd=folder, check=True)
    assert (folder / "stubs" / "pageframe" / "v1" / "gateway_service_pb2_grpc.py").exists()
    program = str(EXAMPLES / "python" / "stubs.py")
    return Program((sys.executable, program), {"PYTHONPATH": str(folder / "stubs")})


@pytest.fixture(scope="module")
def with_client() -> Program:
    return Program((sys.executable, str(EXAMPLES / "python" / "with_client.py")), {})


@pytest.fixture(scope="module", params=["node", "stubs", "with_client"])
def program(request: pytest.FixtureRequest) -> Program:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def system(
    start: Callable[..., System], sim_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[System]:
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text(f"{KEY} {TENANT}\n")
    keys.chmod(0o600)
    system = start(sim_model, "--sim-step", "20ms", "--api-keys", str(keys))
    yield system
    system.settle()
    system.stop()


@pytest.fixture(scope="module")
def due(system: System) -> Sample:
    """What every program must get: what our client gets."""
    request = GenerationRequest(token_ids=[7, 8, 9], max_tokens=150, seed=1, ignore_eos=True)
    with system.client(api_key=KEY) as client:
        (sample,) = client.complete(request).samples
    return sample


def text_of(told: list[dict]) -> str:
    return "".join(line.get("text", "") for line in told)


def tokens_of(told: list[dict]) -> list[int]:
    return [token_id for line in told for token_id in line.get("token_ids", [])]


def test_a_program_streams_a_generation(system: System, program: Program, due: Sample) -> None:
    told = program.run("generate", system.address, KEY)
    assert told[0] == {"request_id": "a-whole-one", "seed": "1"}
    assert (tokens_of(told), text_of(told)) == (due.token_ids, due.text)
    assert len(told) > len(due.token_ids)
    assert told[-1] == {"finish_reason": "FINISH_REASON_LENGTH"}


def test_a_program_goes_on_after_a_broken_stream(
    system: System, program: Program, due: Sample
) -> None:
    process = program.start("generate", system.address, KEY)
    assert process.stdout is not None
    assert process.stderr is not None
    told = [json.loads(process.stdout.readline()) for _ in range(NUM_TOKENS_BEFORE)]
    assert len(tokens_of(told)) < len(due.token_ids)
    system.kill_service("gateway")
    assert process.poll() is None, "it was over before the stream broke"
    # Not by `communicate`, which knows nothing of lines that were read ahead.
    told += [json.loads(line) for line in process.stdout]
    complaints = process.stderr.read()
    assert process.wait(PATIENCE_S) == 0, complaints
    assert (tokens_of(told), text_of(told)) == (due.token_ids, due.text)
    assert told[-1] == {"finish_reason": "FINISH_REASON_LENGTH"}
    assert sum("seed" in line for line in told) == 1
    system.wait_restarted("gateway")


def test_a_program_cancels_what_it_asked_for(system: System, program: Program) -> None:
    *_, last = program.run("cancel", system.address, KEY)
    assert (last["status"], last["reason"]) == ("CANCELLED", "CANCELLED")
    system.settle()


def test_a_program_reads_why_it_is_refused(system: System, program: Program) -> None:
    (told,) = program.run("refuse", system.address, KEY)
    assert told["status"] == "INVALID_ARGUMENT"
    assert told["reason"] == "SAMPLING_PARAMETER_OUT_OF_RANGE"
    assert told["limits"]["field"] == "temperature"
    assert told in [json.loads(block) for block in blocks("json")], "the page shows another answer"


def test_a_program_without_its_key_is_refused(system: System, program: Program) -> None:
    (told,) = program.run("generate", system.address)
    assert (told["status"], told["reason"]) == ("UNAUTHENTICATED", "CREDENTIALS_MISSING")


def test_a_deadline_ends_a_generation_everywhere(system: System, program: Program) -> None:
    *_, last = program.run("expire", system.address, KEY)
    assert last["status"] == "DEADLINE_EXCEEDED"
    system.settle()


def test_a_program_without_protos_asks_the_gateway_what_there_is(system: System) -> None:
    program = [sys.executable, str(EXAMPLES / "python" / "reflect.py"), system.address, KEY]
    asked = subprocess.run(program, env=environment(), capture_output=True, text=True)
    assert asked.returncode == 0, asked.stderr
    methods, _, answer = asked.stdout.partition("{")
    assert "pageframe.v1.GatewayService/Generate(GenerateRequest)" in methods.splitlines()
    assert json.loads("{" + answer)["models"][0]["blockSize"] == 16


def test_pings_of_a_caller_end_its_stream(start: Callable[..., System], sim_model: Path) -> None:
    """What the page says of keepalive; should gRPC's bound go away, the advice goes, too."""
    system = start(sim_model, "--sim-step", "15s")
    options = [("grpc.keepalive_time_ms", 1000), ("grpc.http2.max_pings_without_data", 0)]
    request = gateway_service_pb2.GenerateRequest(token_ids={"ids": [7]})
    with grpc.insecure_channel(system.address, options=options) as channel:
        stub = gateway_service_pb2_grpc.GatewayServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(request, timeout=PATIENCE_S))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert caught.value.details() == "Too many pings"
    system.kill()


def test_reasons_of_the_page_come_with_its_statuses() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| (.*?) \|", PAGE.read_text(encoding="utf-8"), re.M)
    assert len(rows) >= len({status for status, _ in rows}) > 8
    source = "\n".join(
        file.read_text(encoding="utf-8")
        for folder in ("services", "shared")
        for file in (ROOT / folder).rglob("*.py")
    )
    for status, reasons in rows:
        for reason in re.findall(r"`([A-Z_]+)`", reasons):
            raised = rf"{ERROR_CLASSES[status].__name__}\(\s*\"{reason}\""
            assert re.search(raised, source), f"{reason} does not come with {status}"


def test_the_plain_program_needs_nothing_of_ours_but_the_stubs() -> None:
    tree = ast.parse((EXAMPLES / "python" / "stubs.py").read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    ours = {module for module in modules if module and module.startswith("pageframe")}
    assert ours == {"pageframe.v1"}


@pytest.mark.parametrize(("language", "folder"), [("js", "node"), ("python", "python")])
def test_the_code_of_the_page_is_that_of_the_programs(language: str, folder: str) -> None:
    files = "\n".join(
        file.read_text() for file in (EXAMPLES / folder).iterdir() if file.suffix in (".py", ".mjs")
    )
    found = blocks(language)
    assert found
    for block in found:
        assert block in files, f"no program has this: {block.splitlines()[0]}"
