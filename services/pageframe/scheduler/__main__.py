"""Run the scheduler: ``python -m pageframe.scheduler --settings FILE``."""

from pageframe.config.service_main import Serve, run_from_launch_file


def _load() -> Serve:
    from pageframe.scheduler.server import serve_scheduler

    return serve_scheduler


if __name__ == "__main__":
    run_from_launch_file("pageframe-scheduler", _load)
