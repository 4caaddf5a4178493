"""The four systems that are compared, each ready to serve one workload."""

from collections.abc import Callable

from bench.paper.cost_model import CostModel
from bench.paper.orca import OrcaServer, Reservation
from bench.paper.paged import PagedConfig, PagedServer
from bench.paper.run_log import Run
from bench.paper.workload import Workload

PAGEFRAME = "Pageframe"

# Of vLLM at the time of the paper (max_num_seqs and max_num_batched_tokens); the same for all.
MAX_NUM_RUNNING = 256
MAX_STEP_TOKENS = 2560

_SEED = 11

Serve = Callable[[Workload, CostModel], Run]


def _serve_paged(workload: Workload, cost: CostModel) -> Run:
    config = PagedConfig(max_num_running=MAX_NUM_RUNNING, token_budget=MAX_STEP_TOKENS)
    return PagedServer(config, cost, seed=_SEED).serve(workload)


def _orca(reservation: Reservation) -> Serve:
    def serve(workload: Workload, cost: CostModel) -> Run:
        server = OrcaServer(
            reservation, cost, max_num_running=MAX_NUM_RUNNING, max_step_tokens=MAX_STEP_TOKENS
        )
        return server.serve(workload)

    return serve


SYSTEMS: dict[str, Serve] = {
    **{reservation.value: _orca(reservation) for reservation in Reservation},
    PAGEFRAME: _serve_paged,
}
