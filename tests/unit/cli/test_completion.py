"""Shells can complete the command line, and misspelt commands are guessed at."""

import os
import subprocess
import sys

import pytest

from pageframe.cli.commands import wanted_command

MAIN = "from pageframe.cli.main import main; main()"


def run(*arguments, **variables):
    environ = {name: value for name, value in os.environ.items() if "COMP" not in name}
    return subprocess.run(
        [sys.executable, "-c", MAIN, *arguments],
        capture_output=True,
        text=True,
        env=environ | variables,
        timeout=60,
        check=False,
    )


def completed(line):
    """What bash would offer at the end of ``line``."""
    variables = {"_PAGEFRAME_COMPLETE": "complete_bash", "COMP_WORDS": line}
    result = run(**variables, COMP_CWORD=str(len(line.split(" ")) - 1))
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_commands_and_options_are_completed():
    assert {"chat", "generate", "pool", "up"} <= set(completed("pageframe "))
    assert completed("pageframe gen") == ["generate"]
    assert "--max-tokens" in completed("pageframe chat --ma")
    assert "--token-budget" in completed("pageframe up --token-b")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_is_shown_on_demand(shell):
    result = run("--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert result.returncode == 0, result.stderr
    assert "_PAGEFRAME_COMPLETE" in result.stdout


def test_a_misspelt_command_is_guessed_at():
    result = run("genrate", "Hello")
    assert result.returncode == 2
    assert "Did you mean 'generate'?" in result.stderr


def test_only_the_command_that_is_meant_is_loaded():
    assert wanted_command(["--x", "chat", "pool"], {}) == "chat"
    assert wanted_command(["up"], {}) == "up"
    assert wanted_command(["cat"], {}) is None
    assert wanted_command([], {}) is None
    complete = {"_PAGEFRAME_COMPLETE": "complete_bash", "COMP_WORDS": "pageframe pool --j"}
    assert wanted_command([], complete) == "pool"
    complete = {"_PAGEFRAME_COMPLETE": "x", "_TYPER_COMPLETE_ARGS": "pageframe stalls "}
    assert wanted_command([], complete) == "stalls"
