"""The command line: options, exit codes, and errors of one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pageframe.cli.commands import join_switch_words
from pageframe.cli.main import main
from pageframe.config.settings import OPTION_FIELDS
from pageframe.core.errors import InvalidRequestError, PreconditionError
from pageframe.rpc.ready import announce_failure, announce_progress, announce_ready


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    captured = capsys.readouterr()
    code = caught.value.code
    assert isinstance(code, int)
    return code, captured.out, captured.err


def test_every_setting_is_an_option_of_up(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(["up", "--help"], capsys)
    assert code == 0
    for option in OPTION_FIELDS:
        assert f"--{option} " in out, option
    assert "PAGEFRAME_BLOCK_SIZE" in out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["up", "--block-size", "3"], "--block-size"),
        (["up", "--lookahead", "maybe"], "--lookahead"),
        (["up", "--trace=loud"], "--trace"),
        (["up", "--no-such-option"], "--no-such-option"),
        (["up", "--model", "./absent", "--grpc", "127.0.0.1:0"], "./absent"),
        (["model", "prepare", "./absent"], "./absent"),
        (["nonsense"], "nonsense"),
    ],
)
def test_a_mistake_is_named_with_exit_code_2_and_nothing_on_stdout(
    arguments: list[str],
    named: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    code, out, err = run(arguments, capsys)
    assert code == 2
    assert out == ""
    assert named in err.splitlines()[-1]


def test_a_bad_variable_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGEFRAME_TOKEN_BUGDET", "1")
    code, _, err = run(["up"], capsys)
    assert code == 2
    assert "PAGEFRAME_TOKEN_BUGDET" in err
    assert err.count("\n") == 1


def test_model_prepare_prints_the_folder_last(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    code, out, _ = run(["model", "prepare", str(tmp_path)], capsys)
    assert code == 0
    assert out.splitlines()[-1] == str(tmp_path)


@pytest.mark.parametrize(
    ("given", "joined"),
    [
        (["up", "--lookahead"], ["up", "--lookahead"]),
        (["up", "--lookahead", "on"], ["up", "--lookahead"]),
        (["up", "--lookahead", "off"], ["up", "--no-lookahead"]),
        (["up", "--lookahead=FALSE"], ["up", "--no-lookahead"]),
        (["up", "--lookahead", "--trace", "off"], ["up", "--lookahead", "--trace", "off"]),
        (["up", "--no-lookahead"], ["up", "--no-lookahead"]),
    ],
)
def test_a_switch_may_be_followed_by_a_word(given: list[str], joined: list[str]) -> None:
    assert join_switch_words(given) == joined


def test_a_switch_followed_by_nonsense_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="--lookahead"):
        join_switch_words(["up", "--lookahead", "perhaps"])


def test_the_supervisor_does_not_load_torch() -> None:
    """It lives as long as the system; a tensor library would be hundreds of megabytes."""
    script = "import pageframe.cli.up, pageframe.cli.main, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


class ReadyPipe:
    """The descriptor that a supervisor would give."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read_fd, self.write_fd = os.pipe()
        monkeypatch.setenv("PAGEFRAME_READY_FD", str(self.write_fd))

    def reports(self) -> list[object]:
        os.close(self.write_fd)
        with os.fdopen(self.read_fd) as file:
            return [json.loads(line) for line in file]


def test_services_report_one_object_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = ReadyPipe(monkeypatch)
    announce_progress("loading weights", 0.25)
    announce_ready("127.0.0.1:1234")
    assert announce_failure(PreconditionError("NO_GPU", "no GPU here")) == 2
    assert announce_failure(ValueError("a bug")) == 1
    assert announce_failure(PreconditionError("NO_GPU", "no GPU here"), exit_code=1) == 1
    assert pipe.reports() == [
        {"progress": {"message": "loading weights", "fraction": 0.25}},
        {"ready": {"address": "127.0.0.1:1234", "details": {}}},
        {"failed": {"reason": "NO_GPU", "message": "no GPU here", "exit_code": 2}},
        {"failed": {"reason": "ValueError", "message": "a bug", "exit_code": 1}},
        {"failed": {"reason": "NO_GPU", "message": "no GPU here", "exit_code": 1}},
    ]


def test_a_service_started_by_hand_reports_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PAGEFRAME_READY_FD", raising=False)
    announce_ready("127.0.0.1:1234")
    assert announce_failure(ValueError("a bug")) == 1
