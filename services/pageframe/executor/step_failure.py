"""A step in which the model runner failed: what is kept of it, and what its requests are told."""

import structlog

from pageframe.core.errors import InternalError, ResourceExhaustedError

_log = structlog.get_logger(__name__)


class StepFailedError(InternalError):
    """The runner failed in a step; the sequences of that step ended with an error."""


def note_failure(step: int, error: Exception) -> StepFailedError:
    """Log why a step failed, and wrap it."""
    failure = StepFailedError(
        "STEP_FAILED", f"the model runner failed in step {step}: {error}", step=step
    )
    failure.__cause__ = error
    _log.error("step_failed", step=step, exc_info=error)
    return failure


def told_of(failure: StepFailedError | None) -> str:
    """The reason that requests of the step are told: only of what others can do something about."""
    cause = None if failure is None else failure.__cause__
    return cause.reason if isinstance(cause, ResourceExhaustedError) else ""
