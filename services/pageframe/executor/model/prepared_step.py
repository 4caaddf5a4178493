"""A step of compiled kernels that is ready before the step ahead of it is over.

All that Python has to do for it is done: what is left is one call, from the tokens that come in to
the tokens that are chosen.
"""

import time
from collections.abc import Callable

import numpy as np

from pageframe.executor.batch import StepBatch, StepOutput
from pageframe.executor.model.fused import FusedDecoder
from pageframe.executor.model.paged_kv import PagedKv
from pageframe.executor.model.selection import check_finite
from pageframe.executor.model.token_sampler import TokenSampler


def prepare_work(
    decoder: FusedDecoder, kv: PagedKv, sampler: TokenSampler, batch: StepBatch
) -> Callable[[], StepOutput] | None:
    """What computes a step of no drafts whose input tokens may still be written into ``batch``.

    None where somebody's logits are edited or told of, or nobody samples: that takes Python.
    """
    rows, positions = batch.sample_rows, batch.sample_positions
    if not len(rows) or not sampler.is_plain(rows, positions):
        return None
    run, choice = decoder.prepare_decode(
        kv, batch, lambda logits: sampler.foresee(logits, rows, positions)
    )

    def work() -> StepOutput:
        started_ns = time.perf_counter_ns()
        run()
        check_finite(choice.maxima, rows)
        token_ids = choice.token_ids.astype(np.int32)
        return StepOutput(token_ids=token_ids, execute_ns=time.perf_counter_ns() - started_ns)

    return work
