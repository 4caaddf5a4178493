"""Environment variables: which ones are settings, and what a service is left of the others."""

from collections.abc import Mapping

from pageframe.config import machine

ENV_PREFIX = "PAGEFRAME_"
CONFIG_VARIABLE = "PAGEFRAME_CONFIG"

# Variables that begin like a setting and are none.
OTHER_VARIABLES = frozenset(
    {
        CONFIG_VARIABLE,
        "PAGEFRAME_MODELS_DIR",  # where prepared models are kept
        "PAGEFRAME_READY_FD",  # from the supervisor to its children
        "PAGEFRAME_SERVER",  # the server that client commands talk to
        "PAGEFRAME_SERVER_TLS",  # and whether, and how, over TLS
    }
)


def num_threads_unless_set(environ: Mapping[str, str]) -> int:
    """Threads for computing where no setting says: OMP_NUM_THREADS, or what the machine grants."""
    wanted = environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdecimal() and int(wanted) else machine.num_usable_cpus()


def service_environment(environ: Mapping[str, str], num_threads: int) -> dict[str, str]:
    """The caller's environment without settings: those are in the launch file, resolved."""
    kept = {
        name: value
        for name, value in environ.items()
        if not name.startswith(ENV_PREFIX) or name in OTHER_VARIABLES
    }
    return {**kept, "OMP_NUM_THREADS": str(num_threads), "PYTHONUNBUFFERED": "1"}
