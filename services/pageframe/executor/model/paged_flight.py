"""A step that a paged runner has launched, on a device that may be computing it still."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pageframe.executor.batch import StepBatch, StepOutput
from pageframe.executor.model.device_inputs import ComingTokens
from pageframe.executor.model.prompt_logprobs import PromptSpan


@dataclass(frozen=True, slots=True)
class PagedFlight:
    """A ``Flight`` of a ``PagedRunner``.

    Attributes:
        batch: What it computes.
        spans: Prompt tokens that somebody asked about.
        outputs: The decoder's, of those; None without any.
        logits: float32 [K, V]; None where nobody samples. Those of a graph last until the next
            launch.
        coming: Tokens that the device chooses by itself; None where the sampler has to.
        started_ns: When launching began.
        launched_ns: When it ended; on a CPU all but sampling is done by then.
        finish: What collects it.
    """

    batch: StepBatch
    spans: list[PromptSpan]
    outputs: torch.Tensor | None
    logits: torch.Tensor | None
    coming: ComingTokens | None
    started_ns: int
    launched_ns: int
    finish: "Callable[[PagedFlight], StepOutput]"

    takes_cores = False

    @property
    def is_ahead(self) -> bool:
        """Whether its tokens are on the device, and nothing else was asked for."""
        return self.coming is not None and self.outputs is None

    def wait(self) -> None:
        """See ``Flight.wait``."""
        if self.coming is not None:
            self.coming.wait()

    def collect(self) -> StepOutput:
        """See ``Flight.collect``.

        Raises:
            InternalError: LOGITS_NOT_FINITE.
            ResourceExhaustedError: DEVICE_OUT_OF_MEMORY; nothing of the step counts.
        """
        return self.finish(self)
