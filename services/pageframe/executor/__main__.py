"""Run the executor: ``python -m pageframe.executor --settings FILE``."""

from pageframe.config.service_main import Serve, run_from_launch_file


def _load() -> Serve:
    from pageframe.executor.server import serve_executor

    return serve_executor


if __name__ == "__main__":
    run_from_launch_file("pageframe-executor", _load)
