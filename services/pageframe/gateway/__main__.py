"""Run the gateway: ``python -m pageframe.gateway --settings FILE``."""

from pageframe.config.service_main import Serve, run_from_launch_file


def _load() -> Serve:
    from pageframe.gateway.server import serve_gateway

    return serve_gateway


if __name__ == "__main__":
    run_from_launch_file("pageframe-gateway", _load)
