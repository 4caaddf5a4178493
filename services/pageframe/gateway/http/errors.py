"""Typed errors in OpenAI's form, with an HTTP code.

    {"error": {"message": …, "type": …, "param": …, "code": …, "reason": …, "limits": {…}}}

``reason`` and ``limits`` are ours, the same as in the ``ErrorInfo`` of gRPC. ``code`` is OpenAI's
word where there is one, else the reason in small letters.
"""

import math
from collections.abc import Mapping

from pageframe.core.errors import PageframeError
from pageframe.core.request import RateLevel, RateLevels
from pageframe.core.units import NANOSECONDS_PER_SECOND

# As google.rpc.Code maps them, but for two: the caller of a feature that is not offered has asked
# for something wrong (OpenAI answers so, and its clients would try a 501 again), and a server that
# is not in the state to serve is at fault itself.
_CODE_OF_STATUS = {
    "INVALID_ARGUMENT": 400,
    "OUT_OF_RANGE": 400,
    "UNIMPLEMENTED": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "ABORTED": 409,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "FAILED_PRECONDITION": 503,
    "DEADLINE_EXCEEDED": 504,
}
_CODE_OF_REASON = {
    "BODY_TIMEOUT": 408,
    "METHOD_NOT_ALLOWED": 405,
    "REQUEST_TOO_LARGE": 413,
    "CONTENT_TYPE_UNKNOWN": 415,
}
_TYPE_OF_CODE = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_WORD_OF_REASON = {
    "UNKNOWN_MODEL": "model_not_found",
    "CREDENTIALS_MISSING": "invalid_api_key",
    "CREDENTIALS_UNKNOWN": "invalid_api_key",
    "CONTEXT_TOO_LONG": "context_length_exceeded",
    "RATE_LIMITED": "rate_limit_exceeded",
    "UNKNOWN_URL": "unknown_url",
}
# A wait for a place is seconds, not minutes; whoever comes too early is refused again, cheaply.
RETRY_AFTER_S = 1
_CODES_WORTH_ANOTHER_TRY = {429, 503}

PROMPT = "prompt"
"""Stands in the tables below for the field that carries the prompt."""
_PARAM_OF_REASON = {
    "UNKNOWN_MODEL": "model",
    "CONTEXT_TOO_LONG": PROMPT,
    "EXCEEDS_POOL": PROMPT,
    "EMPTY_PROMPT": PROMPT,
    "NO_TOKENIZER": PROMPT,
    "TOO_MANY_MESSAGES": PROMPT,
    "CHAT_TEMPLATE_MISSING": PROMPT,
    "CHAT_TEMPLATE_REFUSED": PROMPT,
    "TOOLS_UNSUPPORTED": "tools",
    "TOO_MANY_STOP_STRINGS": "stop",
    "STOP_STRING_LENGTH_OUT_OF_RANGE": "stop",
    "NUM_SAMPLES_OUT_OF_RANGE": "n",
    "BEST_OF_OUT_OF_RANGE": "best_of",
    "PRIORITY_OUT_OF_RANGE": "priority",
    "SESSION_ID_TOO_LONG": "session_id",
    "PREFIX_HANDLE_TOO_LONG": "prefix_handle",
}


class ErrorForm:
    """Says errors in the names of one endpoint's fields.

    Args:
        prompt: The field that carries the prompt.
        field_names: Names of the endpoint's fields by our own, where they differ.
    """

    def __init__(self, prompt: str = "", field_names: Mapping[str, str] | None = None) -> None:
        self._prompt = prompt
        self._field_names = field_names or {}

    def body(self, error: PageframeError) -> dict[str, object]:
        """The JSON object that tells of ``error``."""
        code = http_code(error)
        return {
            "error": {
                "message": error.message,
                "type": _type(code),
                "param": self._param(error),
                "code": _WORD_OF_REASON.get(error.reason, error.reason.lower()),
                "reason": error.reason,
                "limits": dict(error.limits),
            }
        }

    def _param(self, error: PageframeError) -> str | None:
        field_name = error.limits.get("field")
        if field_name is not None:
            return self._field_names.get(field_name, field_name)
        param = _PARAM_OF_REASON.get(error.reason)
        return self._prompt or None if param is PROMPT else param


def http_code(error: PageframeError) -> int:
    """The HTTP status code of an error."""
    return _CODE_OF_REASON.get(error.reason) or _CODE_OF_STATUS[error.status]


def retry_headers(error: PageframeError) -> dict[str, str]:
    """Headers that tell when to come again, where that is worth it."""
    if http_code(error) not in _CODES_WORTH_ANOTHER_TRY:
        return {}
    retry_after_s = error.limits.get("retry_after_s")
    if retry_after_s is None:
        return {"retry-after": str(RETRY_AFTER_S)}
    # The first is HTTP's own, in whole seconds; OpenAI's clients prefer the second.
    headers = {
        "retry-after": str(max(1, math.ceil(float(retry_after_s)))),
        "retry-after-ms": str(math.ceil(float(retry_after_s) * 1000)),
    }
    return headers | rate_headers(_levels(error.limits))


def rate_headers(levels: RateLevels) -> dict[str, str]:
    """OpenAI's headers that tell what is left of rates, and when all of it is there again."""
    headers = {}
    for what, level in levels.items():
        headers[f"x-ratelimit-limit-{what}"] = str(level.num_per_minute)
        headers[f"x-ratelimit-remaining-{what}"] = str(level.num_left)
        seconds = level.full_after_ns / NANOSECONDS_PER_SECOND
        headers[f"x-ratelimit-reset-{what}"] = f"{seconds:.3f}s"
    return headers


def _levels(limits: Mapping[str, str]) -> RateLevels:
    """What a refusal for a rate says of it."""
    return {
        what: RateLevel(
            int(limits[f"num_{what}_per_minute"]),
            int(limits[f"num_{what}_left"]),
            round(float(limits[f"{what}_full_after_s"]) * NANOSECONDS_PER_SECOND),
        )
        for what in ("requests", "tokens")
        if f"num_{what}_per_minute" in limits
    }


def _type(code: int) -> str:
    if code in _TYPE_OF_CODE:
        return _TYPE_OF_CODE[code]
    return "invalid_request_error" if code < 500 else "server_error"
