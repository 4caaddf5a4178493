"""Run the executor: ``python -m pageframe.executor --settings FILE``."""

from pageframe.config.service_main import run_from_launch_file
from pageframe.executor.server import serve_executor

if __name__ == "__main__":
    run_from_launch_file("pageframe-executor", serve_executor)
