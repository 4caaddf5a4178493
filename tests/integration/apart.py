"""One ``pageframe serve``, started and stopped as a person would."""

import contextlib
import json
import signal
import subprocess
from pathlib import Path

import psutil

from integration.system import PAGEFRAME, PATIENCE_S, environment, eventually


class Alone:
    """One running ``pageframe serve``; variables are set in its environment."""

    def __init__(self, folder: Path, service: str, *arguments: str, **variables: str) -> None:
        self.state_dir = folder / service
        self.state_dir.mkdir()
        self._output = self.state_dir / "output"
        chosen = {"PAGEFRAME_STATE_DIR": str(self.state_dir), "PAGEFRAME_METRICS_PORT": "0"}
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                [str(PAGEFRAME), "serve", service, *arguments],
                cwd=folder,
                env=environment(**(chosen | variables)),
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def child(self, module: str) -> psutil.Process | None:
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if module in child.cmdline():
                    return child
        return None

    def output(self) -> str:
        return self._output.read_text()

    def says(self, words: str) -> bool:
        """Whether it has said something so far."""
        return words in self.output()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def published(gateway: Alone, door: str = "grpc") -> str:
    """Where clients find the gateway, once it serves."""
    path = gateway.state_dir / "address.json"
    eventually(path.exists, f"the gateway serves: {gateway.output()}")
    return str(json.loads(path.read_text())[door])
