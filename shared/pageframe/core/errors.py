"""The one exception tree of Pageframe.

    PageframeError                 canonical status, machine-readable reason, numbers
    ├── InvalidRequestError        INVALID_ARGUMENT      the caller's request is malformed
    ├── OutOfRangeError            OUT_OF_RANGE          well formed, but past a limit of the model
    ├── NotFoundError              NOT_FOUND             a named thing does not exist
    ├── AlreadyExistsError         ALREADY_EXISTS        a name is taken
    ├── UnauthenticatedError       UNAUTHENTICATED       no valid credentials
    ├── PermissionDeniedError      PERMISSION_DENIED     the caller may not do this
    ├── PreconditionError          FAILED_PRECONDITION   the system is not in the needed state
    ├── ResourceExhaustedError     RESOURCE_EXHAUSTED    a pool, queue or quota is full
    ├── DeadlineError              DEADLINE_EXCEEDED     too late
    ├── CancelledError             CANCELLED             the caller took it back
    ├── AbortedError               ABORTED               somebody newer took its place
    ├── UnavailableError           UNAVAILABLE           try again later, perhaps elsewhere
    ├── UnimplementedError         UNIMPLEMENTED         known, but not offered by this server
    └── InternalError              INTERNAL              our bug

``rpc.status`` maps each class to a gRPC status with an ``ErrorInfo`` detail; a test fails when a
class is missing there. ``reason`` is UPPER_SNAKE and stable: programs may branch on it. ``limits``
carries the numbers, each key with its unit.
"""

from collections.abc import Mapping
from typing import ClassVar

ERROR_DOMAIN = "pageframe"


class PageframeError(Exception):
    """Root of all errors that may cross a process boundary.

    Attributes:
        reason: UPPER_SNAKE name of the cause, stable across releases.
        message: One sentence that a user can act on.
        limits: The numbers involved; keys carry units, values are decimal text.
    """

    status: ClassVar[str] = "UNKNOWN"

    def __init__(self, reason: str, message: str, **limits: object) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.limits: Mapping[str, str] = {key: str(value) for key, value in limits.items()}

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


class InvalidRequestError(PageframeError):
    """The request is malformed, whatever the state of the system."""

    status = "INVALID_ARGUMENT"


class OutOfRangeError(PageframeError):
    """The request is well formed but asks for more than this model or pool can ever do."""

    status = "OUT_OF_RANGE"


class NotFoundError(PageframeError):
    """A named model, request, handle or block does not exist."""

    status = "NOT_FOUND"


class AlreadyExistsError(PageframeError):
    """The name is taken by something that is still alive."""

    status = "ALREADY_EXISTS"


class UnauthenticatedError(PageframeError):
    """The caller did not prove who it is."""

    status = "UNAUTHENTICATED"


class PermissionDeniedError(PageframeError):
    """The caller is known and may not do this."""

    status = "PERMISSION_DENIED"


class PreconditionError(PageframeError):
    """The system is not in the state that the call needs."""

    status = "FAILED_PRECONDITION"


class ResourceExhaustedError(PageframeError):
    """A bounded thing is full: a queue, the pool, a quota, a message size."""

    status = "RESOURCE_EXHAUSTED"


class DeadlineError(PageframeError):
    """The deadline has passed, or will pass before the work can be done."""

    status = "DEADLINE_EXCEEDED"


class CancelledError(PageframeError):
    """The caller, or somebody on its behalf, took the request back."""

    status = "CANCELLED"


class AbortedError(PageframeError):
    """Something newer took its place: a stream with a higher epoch, for example."""

    status = "ABORTED"


class UnavailableError(PageframeError):
    """Not now: starting, draining, or a peer is away. A retry may succeed."""

    status = "UNAVAILABLE"


class UnimplementedError(PageframeError):
    """The contract has it, this server does not offer it."""

    status = "UNIMPLEMENTED"


class InternalError(PageframeError):
    """A broken invariant of our own."""

    status = "INTERNAL"
