"""Keys, limits of tenants and secrets, over the whole system."""

import os
from collections.abc import Callable
from pathlib import Path

import openai
import pytest

from integration.system import PATIENCE_S, System, eventually
from pageframe.client import GenerationRequest, PageframeClient
from pageframe.core.errors import PageframeError, ResourceExhaustedError
from pageframe.rpc.auth import hashed_key

SECRET = "pf-key-that-nobody-may-see"
PROMPT = "the words of Ada that nobody may see"


def complete(system: System, key: str, **fields: object) -> None:
    request = GenerationRequest(token_ids=[5] * 8, ignore_eos=True, **{"max_tokens": 2, **fields})
    with PageframeClient(system.address, api_key=key, retry_for_s=0) as client:
        client.complete(request, timeout_s=PATIENCE_S)


def ends(system: System, key: str) -> str:
    """Why a small request is refused; empty if it is not."""
    try:
        complete(system, key)
    except PageframeError as error:
        return error.reason
    return ""


def put(path: Path, text: str) -> None:
    """A new file in the place of the old one, as editors and mounted secrets do it."""
    path.with_suffix(".next").write_text(text)
    path.with_suffix(".next").chmod(0o600)
    os.replace(path.with_suffix(".next"), path)


def test_limits_hold_at_both_doors_and_other_ones_once_the_file_says_so(
    start: Callable[..., System], sim_model: Path, tmp_path: Path
) -> None:
    access = tmp_path / "access"
    keys = f"{hashed_key('k1')} alice\n{hashed_key('k2')} bob\n"
    put(access, keys + "tenant alice requests-per-minute=2 tokens-per-minute=1000\n")
    system = start(sim_model, "--api-keys", str(access))
    complete(system, "k1")
    url = f"http://{system.http_address}/v1"
    with openai.OpenAI(base_url=url, api_key="k1", max_retries=0) as client:
        told = client.completions.with_raw_response.create(model="", prompt="a", max_tokens=1)
        assert told.headers["x-ratelimit-limit-requests"] == "2"
        assert told.headers["x-ratelimit-remaining-requests"] == "0"
        assert float(told.headers["x-ratelimit-reset-requests"].rstrip("s")) > 30
        assert 0 < int(told.headers["x-ratelimit-remaining-tokens"]) < 1000
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="", prompt="a", max_tokens=1)
    headers = caught.value.response.headers
    assert headers["x-ratelimit-limit-requests"] == "2"
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert headers["x-ratelimit-limit-tokens"] == "1000"
    assert 1 <= int(headers["retry-after"]) <= 30
    with pytest.raises(ResourceExhaustedError, match="RATE_LIMITED") as caught:
        complete(system, "k1")
    error = caught.value
    assert 0 < float(error.limits["retry_after_s"]) <= 30
    complete(system, "k2")

    put(access, f"{hashed_key('k3')} alice\n")
    eventually(lambda: ends(system, "k1") == "CREDENTIALS_UNKNOWN", "the old key is forgotten")
    eventually(lambda: ends(system, "k3") == "", "the scheduler has the new terms")
    for _ in range(5):
        complete(system, "k3")
    system.settle()
    system.stop()


def test_requests_that_run_outlive_the_scheduler_whatever_their_tenants_rate(
    start: Callable[..., System], sim_model: Path, tmp_path: Path
) -> None:
    access = tmp_path / "access"
    put(access, "k1 alice\n")
    system = start(sim_model, "--api-keys", str(access), "--sim-step", "20ms")
    with PageframeClient(system.address, api_key="k1", retry_for_s=0) as client:
        request = GenerationRequest(token_ids=[5] * 8, max_tokens=700, ignore_eos=True)
        running = [client.generate(request, timeout_s=PATIENCE_S) for _ in range(3)]
        for events in running:
            next(events), next(events)
        put(access, "k1 alice\ntenant alice requests-per-minute=1\n")
        eventually(lambda: ends(system, "k1") == "RATE_LIMITED", "the scheduler has the new terms")
        # The next one knows of no request that was let in, and lets one in in a minute.
        system.kill_service("scheduler")
        for events in running:
            assert list(events)[-1].account.num_completion_tokens == 700
    system.settle()
    system.stop()


def test_neither_keys_nor_prompts_are_in_logs_or_traces(
    start: Callable[..., System], sim_model: Path, tmp_path: Path
) -> None:
    access = tmp_path / "access"
    put(access, f"{SECRET} alice operator\n{SECRET}-2 bob\n")
    system = start(sim_model, "--api-keys", str(access), "--trace", "audit", "--log-level", "debug")
    url = f"http://{system.http_address}/v1"
    with PageframeClient(system.address, api_key=SECRET) as client:
        request = GenerationRequest(prompt=PROMPT, max_tokens=3)
        output = client.complete(request, timeout_s=PATIENCE_S).samples[0].text
        with pytest.raises(PageframeError):
            client.complete(GenerationRequest(prompt=PROMPT * 9000), timeout_s=PATIENCE_S)
    with openai.OpenAI(base_url=url, api_key=SECRET, max_retries=0) as http:
        http.completions.create(model="", prompt=PROMPT, max_tokens=3)
    with (
        openai.OpenAI(base_url=url, api_key=f"{SECRET}-wrong", max_retries=0) as http,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        http.completions.create(model="", prompt=PROMPT, max_tokens=3)
    assert SECRET not in str(caught.value)
    put(access, f"{SECRET} alice operator nonsense\n")
    # Only the logs: spooled traces are there one moment and sent and deleted the next.
    logs = system.state_dir / "logs"
    eventually(
        lambda: any(b"access_file_refused" in it.read_bytes() for it in files(logs)),
        "the new file is complained of",
    )
    system.settle()
    system.stop()
    num_traces = 0
    for path in files(system.state_dir):
        content = path.read_bytes()
        num_traces += b"kv.allocate" in content
        for secret in (SECRET, PROMPT, hashed_key(SECRET).removeprefix("sha256:")):
            assert secret.encode() not in content, f"{secret!r} is in {path}"
    assert num_traces, "there are no traces to look into"
    assert output


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
