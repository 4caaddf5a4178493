"""A load generator that others wrote, against the OpenAI door of a running system.

    make load-test
    python -m bench.openai_load --aiperf .venv-load/bin/aiperf --requests 500 --concurrency 32

NVIDIA's aiperf lives in a virtual environment of its own, since it pins what we do not. It is run
once for each kind of request; exits with 1 if one did not end well, or fewer ended than were asked
for. What it measures is left in the folder that is named at the end.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bench.chaos.system import System
from pageframe.config.launch import Launch

_TIMEOUT_S = 600.0
_EXPORT = "profile_export_aiperf.json"


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of request.

    Attributes:
        name: Of its folder.
        options: What makes the load generator ask so.
    """

    name: str
    options: tuple[str, ...]


KINDS = (
    Kind("chat-stream", ("--endpoint-type", "chat", "--streaming")),
    Kind("chat", ("--endpoint-type", "chat")),
    Kind("completions-stream", ("--endpoint-type", "completions", "--streaming")),
    Kind("completions", ("--endpoint-type", "completions")),
)


def main() -> int:
    """Run it."""
    arguments = _arguments()
    console = Console(stderr=True)
    folder = arguments.output or Path(tempfile.mkdtemp(prefix="pageframe-load-"))
    runner_options = ("--sim-step", arguments.sim_step) if arguments.runner == "sim" else ()
    options = ("--http", "127.0.0.1:0", *runner_options)
    failures = []
    with (
        tempfile.TemporaryDirectory(prefix="pageframe-load-state-") as state_dir,
        System(Path(state_dir), arguments.model, arguments.runner, options) as system,
    ):
        address = json.loads((Path(state_dir) / "address.json").read_text())["http"]
        model_folder = _model_folder(system)
        for kind in KINDS:
            with console.status(f"{kind.name}: {arguments.requests} requests"):
                failure = _run(arguments, kind, address, model_folder, folder / kind.name)
            console.print(f"{kind.name}: {failure or 'ended without an error'}")
            failures += [failure] if failure else []
    console.print(f"measurements are in {folder}")
    return 1 if failures else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A public load generator at the OpenAI door.")
    parser.add_argument("--aiperf", type=Path, required=True, help="its program")
    parser.add_argument("--requests", type=int, default=200, help="of each kind")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--runner", choices=["sim", "native"], default="sim")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--sim-step", default="10ms", help="time of a step of the sim runner")
    parser.add_argument("--output", type=Path, help="folder for what it measures")
    return parser.parse_args()


def _model_folder(system: System) -> str:
    """Where the tokenizer is; the load generator makes prompts with it."""
    command = system.service("gateway").cmdline()
    return str(Launch.read(Path(command[command.index("--settings") + 1])).model_path)


def _run(
    arguments: argparse.Namespace, kind: Kind, address: str, model_folder: str, folder: Path
) -> str:
    """One run; returns what went wrong, or nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [str(arguments.aiperf), "profile", "--model", arguments.model]
    command += ["--url", f"http://{address}", *kind.options, "--tokenizer", model_folder]
    command += ["--concurrency", str(arguments.concurrency)]
    command += ["--request-count", str(arguments.requests), "--random-seed", "1"]
    command += ["--synthetic-input-tokens-mean", "120", "--output-tokens-mean", "40"]
    # The simulated runner's tokens are no text that could be read back to the same tokens.
    command += ["--extra-inputs", "ignore_eos:true", "--use-server-token-count"]
    command += ["--ui", "none", "--no-auto-plot", "--artifact-dir", str(folder)]
    with (folder / "aiperf.log").open("w") as log:
        ended = subprocess.run(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"AIPERF_HOME": str(folder)},
            timeout=_TIMEOUT_S,
            check=False,
        )
    if ended.returncode or not (folder / _EXPORT).is_file():
        return f"aiperf ended with {ended.returncode}; see {folder / 'aiperf.log'}"
    return verdict(json.loads((folder / _EXPORT).read_text()), arguments.requests)


def verdict(export: dict[str, object], num_requests: int) -> str:
    """What an export of aiperf tells of failures; empty for none."""
    counted = export.get("request_count")
    num_ended = counted.get("avg", 0) if isinstance(counted, dict) else 0
    errors = export.get("error_summary")
    if errors:
        return f"errors: {json.dumps(errors)[:1000]}"
    if export.get("was_cancelled") or num_ended != num_requests:
        return f"{num_ended:g} of {num_requests} requests ended"
    return ""


if __name__ == "__main__":
    sys.exit(main())
