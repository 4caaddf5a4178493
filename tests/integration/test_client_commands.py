"""``pageframe generate`` as a person or a script would call it."""

import json
import subprocess

import pytest

from integration.system import PAGEFRAME, PATIENCE_S, System, environment
from pageframe.client import GenerationRequest

DEAD_PROXY = "http://127.0.0.1:9"


def pageframe(
    *arguments: str, stdin: str = "", **variables: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [str(PAGEFRAME), *arguments],
        input=stdin,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def test_json_is_one_object_with_all_that_was_promised(llama_system: System) -> None:
    done = pageframe(
        *("generate", "The capital of France is", "--max-tokens", "8", "--temperature", "0"),
        *("--ignore-eos", "--json", "--server", llama_system.address),
    )
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    answer = json.loads(line)
    assert len(answer["token_ids"]) == 8
    assert answer["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["usage"]["prompt_tokens"] > 0
    assert answer["usage"]["cached_tokens"] == 0
    assert len(bytes.fromhex(answer["trace_id"])) == 16
    same = llama_system.complete(
        GenerationRequest(
            prompt="The capital of France is", max_tokens=8, temperature=0.0, ignore_eos=True
        )
    )
    assert (answer["text"], answer["token_ids"]) == (
        same.samples[0].text,
        same.samples[0].token_ids,
    )


def test_text_streams_as_it_comes(slow_system: System) -> None:
    """The first words are out long before the last ones are made."""
    command = [str(PAGEFRAME), "generate", "hello", "--max-tokens", "600", "--temperature", "0"]
    with subprocess.Popen(
        [*command, "--server", slow_system.address],
        env=environment(),
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read1(1)
        assert slow_system.snapshot().sequences, "it is still being made"
        process.kill()
    slow_system.settle()


def test_the_server_is_found_by_its_state_folder_and_past_a_dead_proxy(
    llama_system: System,
) -> None:
    done = pageframe(
        *("generate", "fox", "--max-tokens", "2", "--json"),
        *("--state-dir", str(llama_system.state_dir)),
        http_proxy=DEAD_PROXY,
        https_proxy=DEAD_PROXY,
        grpc_proxy=DEAD_PROXY,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == llama_system.model


def test_a_refusal_is_one_line_or_one_object(llama_system: System) -> None:
    arguments = ("generate", "fox", "--temperature", "-1", "--server", llama_system.address)
    done = pageframe(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert "SAMPLING_PARAMETER_OUT_OF_RANGE" in line
    done = pageframe(*arguments, "--json")
    assert done.returncode == 1
    error = json.loads(done.stdout)["error"]
    assert (error["status"], error["reason"]) == (
        "INVALID_ARGUMENT",
        "SAMPLING_PARAMETER_OUT_OF_RANGE",
    )
    assert error["limits"]["value"] == "-1.0"


GOOD_LINES = [
    {"prompt": "the quick", "max_tokens": 4},
    {"prompt": "Grüße aus Köln 👋", "max_tokens": 4, "temperature": 0},
    {"token_ids": [3, 4, 5], "max_tokens": 7, "seed": 9},
    {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3},
    {"prompt": "fox", "max_tokens": 5, "n": 3, "seed": 1, "ignore_eos": True},
    {"prompt": "fox", "max_tokens": 5, "logprobs": 2, "prompt_logprobs": 1},
    {"prompt": "fox", "max_tokens": 30, "stop": ["e", "a"], "top_k": 40, "top_p": 0.9},
    {"prompt": "fox", "max_tokens": 6, "min_tokens": 6, "logit_bias": {"7": 5.0}},
]
BAD_LINES = {
    '{"prompt": "fox"': "MALFORMED_LINE",
    '["fox"]': "MALFORMED_LINE",
    '{"prompt": "fox", "temprature": 1}': "UNKNOWN_FIELD",
    '{"prompt": "fox", "max_tokens": "four"}': "MALFORMED_FIELD",
    '{"prompt": "fox", "temperature": NaN}': "SAMPLING_PARAMETER_OUT_OF_RANGE",
    '{"token_ids": [70000]}': "TOKEN_ID_OUT_OF_RANGE",
    '{"prompt": ""}': "EMPTY_PROMPT",
    '{"prompt": "fox", "model": "gpt-17"}': "UNKNOWN_MODEL",
}


def test_many_lines_run_at_once_and_a_bad_one_harms_no_other(llama_system: System) -> None:
    good = [json.dumps(line) for line in [*GOOD_LINES, *GOOD_LINES]]
    bad = list(BAD_LINES)
    # A bad one after every two good ones.
    lines = [line for index, entry in enumerate(bad) for line in (*good[2 * index :][:2], entry)]
    done = pageframe(
        "generate", "--stdin-jsonl", "--server", llama_system.address, stdin="\n".join(lines)
    )
    assert done.returncode == 1, "one failed"
    assert done.stderr == ""
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["index"] for answer in answers] == list(range(24))
    for line, answer in zip(lines, answers, strict=True):
        if line in BAD_LINES:
            assert answer["error"]["reason"] == BAD_LINES[line]
        else:
            assert 1 <= len(answer["token_ids"]) <= json.loads(line)["max_tokens"]
            assert answer["finish_reason"] in ("stop", "length")
    assert len(answers[6]["samples"]) == 3, "the fifth good line"
    assert len(answers[7]["logprobs"]) == len(answers[7]["token_ids"])
    with_seed = [answer for answer in answers if answer.get("seed") == 9]
    assert with_seed[0]["token_ids"] == with_seed[1]["token_ids"]


@pytest.mark.parametrize(
    "arguments", [("generate",), ("generate", "a", "--stdin-jsonl"), ("generate", "a", "--sampl")]
)
def test_a_wrong_call_is_told_how(arguments: tuple[str, ...]) -> None:
    done = pageframe(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Usage: pageframe generate" in done.stderr
