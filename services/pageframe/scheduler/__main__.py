"""Run the scheduler: ``python -m pageframe.scheduler --settings FILE``."""

from pageframe.config.service_main import run_from_launch_file
from pageframe.scheduler.server import serve_scheduler

if __name__ == "__main__":
    run_from_launch_file("pageframe-scheduler", serve_scheduler)
