"""Mutual TLS on every way between processes, as a person would set it up."""

import asyncio
import contextlib
import http.client
import json
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from certificates import Authority, Pair
from integration.apart import Alone, published
from integration.system import ANSWER_S, PAGEFRAME, PATIENCE_S, environment, eventually
from pageframe.client import AsyncPageframeClient, ClientTls, GenerationRequest, PageframeClient
from pageframe.client.kv_memory import KvMemoryClient
from pageframe.core.errors import PageframeError, UnauthenticatedError
from pageframe.rpc.health import ask_health
from pageframe.rpc.tls import TLS_VARIABLE
from ports import free_ports

REQUEST = GenerationRequest(token_ids=[7, 8, 9], max_tokens=20, seed=1)
# What the services are called by, wherever they are: a certificate that says so holds anywhere.
INSIDE = "subjectAltName=DNS:inside.example"


class Encrypted:
    """Three services: a CA for what goes on inside, and another one for those who come."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.inside = Authority(folder, "inside")
        self.outside = Authority(folder, "outside")
        self.door = self.outside.issue("door")
        self.caller = self.outside.issue("caller")
        self.ports = {name: free_ports() for name in ("scheduler", "executor")}
        scheduler, executor = (f"127.0.0.1:{self.ports[it]}" for it in ("scheduler", "executor"))
        common = ("--model", str(model))
        self.services: dict[str, Alone] = {}
        self.services["executor"] = Alone(
            *(folder, "executor", "--listen", executor, *common, *self._inner("executor")),
            *("--runner", "sim", "--sim-step", "2ms"),
        )
        self.services["scheduler"] = Alone(
            *(folder, "scheduler", "--listen", scheduler, "--executor", executor, *common),
            *self._inner("scheduler"),
        )
        peer = self.inside.issue("gateway", extension=INSIDE)
        self.services["gateway"] = Alone(
            *(folder, "gateway", "--scheduler", scheduler, "--executor", executor, *common),
            *("--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0"),
            *("--tls-cert", str(self.door.cert), "--tls-key", str(self.door.key)),
            *("--tls-client-ca", str(self.outside.pem), "--tls-peer-ca", str(self.inside.pem)),
            *("--tls-peer-cert", str(peer.cert), "--tls-peer-key", str(peer.key)),
            *("--tls-peer-name", "inside.example"),
        )

    def _inner(self, service: str) -> list[str]:
        pair = self.inside.issue(service, extension=INSIDE)
        return [
            *("--tls-cert", str(pair.cert), "--tls-key", str(pair.key)),
            *("--tls-client-ca", str(self.inside.pem), "--tls-peer-ca", str(self.inside.pem)),
            *("--tls-peer-name", "inside.example"),
        ]

    @property
    def address(self) -> str:
        return published(self.services["gateway"])

    @property
    def tls(self) -> ClientTls:
        return ClientTls(ca=self.outside.pem, cert=self.caller.cert, key=self.caller.key)

    @property
    def inner_tls(self) -> ClientTls:
        """Of an operator, who is let in where the services meet."""
        pair = self.inside.issue("operator")
        return ClientTls(ca=self.inside.pem, cert=pair.cert, key=pair.key, name="inside.example")

    def end(self) -> None:
        for service in self.services.values():
            service.kill()


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory, sim_model: Path) -> Iterator[Encrypted]:
    made = Encrypted(tmp_path_factory.mktemp("tls"), sim_model)
    yield made
    made.end()


def _option(tls: ClientTls) -> str:
    """A client's TLS as commands take it."""
    name = f",name={tls.name}" if tls.name else ""
    return f"{tls.ca},cert={tls.cert},key={tls.key}{name}"


def _command(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(PAGEFRAME), *words],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def test_both_clients_generate(encrypted: Encrypted) -> None:
    async def complete() -> list[int]:
        async with AsyncPageframeClient(encrypted.address, tls=encrypted.tls) as client:
            return list((await client.complete(REQUEST, timeout_s=PATIENCE_S)).samples[0].token_ids)

    with PageframeClient(encrypted.address, tls=encrypted.tls) as client:
        token_ids = client.complete(REQUEST, timeout_s=PATIENCE_S).samples[0].token_ids
    assert len(token_ids) == 20
    assert asyncio.run(complete()) == list(token_ids)


def test_the_http_door_is_https_and_asks_for_a_certificate(encrypted: Encrypted) -> None:
    host, _, port = published(encrypted.services["gateway"], "http").rpartition(":")

    def models(pair: Pair | None) -> list[str]:
        context = ssl.create_default_context(cafile=str(encrypted.outside.pem))
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        if pair is not None:
            context.load_cert_chain(pair.cert, pair.key)
        door = http.client.HTTPSConnection(host, int(port), timeout=PATIENCE_S, context=context)
        with contextlib.closing(door):
            door.request("GET", "/v1/models")
            return [it["id"] for it in json.load(door.getresponse())["data"]]

    assert encrypted.address
    assert len(models(encrypted.caller)) == 1
    with pytest.raises((OSError, http.client.HTTPException)):
        models(None)
    with pytest.raises((OSError, http.client.HTTPException)):
        models(encrypted.inside.issue("intruder"))
    assert len(models(encrypted.caller)) == 1


def test_the_pool_page_looks_at_an_executor_over_tls(encrypted: Encrypted) -> None:
    host, _, port = published(encrypted.services["gateway"], "http").rpartition(":")
    context = ssl.create_default_context(cafile=str(encrypted.outside.pem))
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.load_cert_chain(encrypted.caller.cert, encrypted.caller.key)
    door = http.client.HTTPSConnection(host, int(port), timeout=PATIENCE_S, context=context)
    with contextlib.closing(door):
        door.request("GET", "/pool/blocks/0")
        response = door.getresponse()
        assert (response.status, json.load(response)["block_id"]) == (200, 0)


def test_each_service_tells_its_health_to_those_it_knows(encrypted: Encrypted) -> None:
    inner_tls = encrypted.inner_tls
    for address, tls in (
        (encrypted.address, encrypted.tls),
        *((f"127.0.0.1:{port}", inner_tls) for port in encrypted.ports.values()),
    ):
        assert ask_health(address, tls=tls) == "SERVING"
        assert ask_health(address) == "UNAVAILABLE"
        said = _command("health", address, **{TLS_VARIABLE: _option(tls)})
        assert (said.returncode, said.stdout) == (0, "SERVING\n")
        refused = _command("health", address)
        assert refused.returncode == 1
        assert "speaks TLS" in refused.stderr


def test_an_operator_looks_at_the_pool_and_a_stranger_does_not(encrypted: Encrypted) -> None:
    assert encrypted.address
    address = f"127.0.0.1:{encrypted.ports['executor']}"
    with KvMemoryClient(address, tls=encrypted.inner_tls) as memory:
        assert memory.snapshot().account.total > 0
    with (
        KvMemoryClient(address, tls=encrypted.tls, timeout_s=ANSWER_S) as memory,
        pytest.raises(UnauthenticatedError) as caught,
    ):
        memory.snapshot()
    assert caught.value.reason == "TLS_PEER_NOT_TRUSTED"


@pytest.mark.slow
def test_commands_talk_tls_when_told(encrypted: Encrypted) -> None:
    where = ("--server", encrypted.address)
    option = ("--tls", _option(encrypted.tls))
    generated = _command("generate", "a", "--max-tokens", "3", "--json", *where, *option)
    assert generated.returncode == 0, generated.stderr
    assert json.loads(generated.stdout)["usage"]["completion_tokens"] == 3
    lines = subprocess.run(
        [str(PAGEFRAME), "generate", "--stdin-jsonl", "--max-tokens", "3", *where],
        env=environment(**{TLS_VARIABLE: _option(encrypted.tls)}),
        input='{"prompt": "a"}\n',
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert lines.returncode == 0, lines.stderr
    told = _command("chat", "--once", "a", "--max-tokens", "3", "--json", *where, *option)
    assert told.returncode == 0, told.stderr
    executor = ("--server", f"127.0.0.1:{encrypted.ports['executor']}")
    looked = _command("pool", "--json", *executor, "--tls", _option(encrypted.inner_tls))
    assert looked.returncode == 0, looked.stderr


@pytest.mark.slow
def test_a_command_without_what_it_needs_says_so(encrypted: Encrypted) -> None:
    where = ("--server", encrypted.address)
    plain = _command("generate", "a", *where)
    bare = _command("generate", "a", *where, "--tls", str(encrypted.outside.pem))
    wrong = _command("generate", "a", *where, "--tls", str(encrypted.inside.pem))
    missing = _command("generate", "a", *where, "--tls", "/nowhere/ca.pem")
    assert [it.returncode for it in (plain, bare, wrong, missing)] == [1, 1, 1, 2]
    assert "speaks TLS" in plain.stderr
    assert "asks callers for a certificate" in bare.stderr
    assert "not known by the CA" in wrong.stderr
    assert "cannot read /nowhere/ca.pem" in missing.stderr


def test_services_find_each_other_again_and_the_door_takes_a_new_certificate(
    encrypted: Encrypted,
) -> None:
    address = encrypted.address
    newer = Authority(encrypted.door.cert.parent, "newer")
    victim = encrypted.services["executor"].child("pageframe.executor")
    assert victim is not None
    victim.kill()
    with PageframeClient(address, tls=encrypted.tls) as client:
        assert len(client.complete(REQUEST, timeout_s=PATIENCE_S).samples[0].token_ids) == 20
    encrypted.door.replace_by(newer.issue("newer_door"))
    tls = ClientTls(ca=newer.pem, cert=encrypted.caller.cert, key=encrypted.caller.key)
    with PageframeClient(address, tls=tls) as client:
        assert len(client.complete(REQUEST, timeout_s=PATIENCE_S).samples[0].token_ids) == 20
    with (
        PageframeClient(address, tls=encrypted.tls) as client,
        pytest.raises(UnauthenticatedError),
    ):
        client.complete(REQUEST, timeout_s=PATIENCE_S)


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> tuple[Authority, Path]:
    folder = tmp_path_factory.mktemp("bad")
    return Authority(folder), folder


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "cannot read"),
        ("half", "no key to go with it"),
        ("mismatch", "not that of the certificate"),
        ("expired", "has expired on"),
        ("ca", "no PEM file of certificates"),
        ("peer", "without it other services are called in plain text"),
    ],
)
def test_a_service_with_bad_files_says_which_and_does_not_start(
    bad: tuple[Authority, Path], kind: str, words: str
) -> None:
    authority, folder = bad
    good = authority.issue("good")
    pair = ("--tls-cert", str(good.cert), "--tls-key", str(good.key))
    old, other = authority.issue("old", days=0), authority.issue("other")
    options = {
        "missing": ("--tls-cert", f"{folder}/no.pem", "--tls-key", str(good.key)),
        "half": ("--tls-cert", str(good.cert)),
        "mismatch": ("--tls-cert", str(good.cert), "--tls-key", str(other.key)),
        "expired": ("--tls-cert", str(old.cert), "--tls-key", str(old.key)),
        "ca": (*pair, "--tls-client-ca", str(good.key)),
        "peer": (*pair, "--tls-peer-name", "inside.example"),
    }[kind]
    listen = ("--listen", "127.0.0.1:0", "--executor", "127.0.0.1:1")
    state = ("--state-dir", str(folder / "state"))
    ended = _command("serve", "scheduler", *listen, *state, *options)
    assert ended.returncode == 2
    assert words in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert not (folder / "state" / "run").exists()


def test_up_serves_tls_at_its_doors(
    sim_model: Path, tmp_path: Path, bad: tuple[Authority, Path]
) -> None:
    pair = bad[0].issue("up")
    state_dir = tmp_path / "state"
    command = [str(PAGEFRAME), "up", "--model", str(sim_model), "--runner", "sim"]
    command += ["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--metrics-port", "0"]
    command += ["--state-dir", str(state_dir), "--trace", "off"]
    command += ["--tls-cert", str(pair.cert), "--tls-key", str(pair.key)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
    try:
        path = state_dir / "address.json"
        eventually(path.exists, "it serves")
        address = json.loads(path.read_text())["grpc"]
        with PageframeClient(address, tls=ClientTls(ca=bad[0].pem)) as client:
            assert len(client.complete(REQUEST, timeout_s=PATIENCE_S).samples[0].token_ids) == 20
        with PageframeClient(address, retry_for_s=0.0) as client, pytest.raises(PageframeError):
            client.complete(REQUEST, timeout_s=PATIENCE_S)
    finally:
        process.terminate()
        assert process.wait(PATIENCE_S) == 0
