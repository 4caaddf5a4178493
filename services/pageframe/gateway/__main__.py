"""Run the gateway: ``python -m pageframe.gateway --settings FILE``."""

from pageframe.config.service_main import run_from_launch_file
from pageframe.gateway.server import serve_gateway

if __name__ == "__main__":
    run_from_launch_file("pageframe-gateway", serve_gateway)
