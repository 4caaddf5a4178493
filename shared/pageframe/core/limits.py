"""Every named maximum of the system, and the relations between them.

A queue without a bound is a leak that has not happened yet. Bounds that depend on one another
are checked here, next to their reasons, when the module is imported.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds that hold in every process. Sizes in bytes, counts without a unit."""

    # Requests, checked at the gateway and again where they act.
    temperature_max: float = 100.0
    num_logprobs_max: int = 20
    num_stop_token_ids_max: int = 256
    num_logit_biases_max: int = 1024
    num_stop_strings_max: int = 64
    stop_string_bytes_max: int = 1024
    num_samples_max: int = 64
    num_beams_max: int = 64
    length_penalty_max: float = 10.0
    request_id_bytes_max: int = 128
    session_id_bytes_max: int = 256
    prefix_handle_bytes_max: int = 256
    num_chat_messages_max: int = 4096
    num_tools_max: int = 128
    # A JSON Schema or a regular expression; most that are so long are read in a tenth of a second.
    grammar_bytes_max: int = 64 * 1024
    grammar_compute_seconds_max: float = 2.0
    # Prompts of one completion; each is a request of its own.
    num_prompts_max: int = 128
    # A prompt of 1 Mi tokens at 4 bytes a token of text, with room for JSON around it.
    request_bytes_max: int = 8 * 1024 * 1024
    # Queues.
    num_requests_per_gateway_max: int = 4096
    # Connections to the HTTP door; each may keep a header and a body in memory.
    num_http_connections_max: int = 4096
    http_header_bytes_max: int = 64 * 1024
    num_queued_requests_max: int = 4096
    num_queued_tokens_max: int = 16 * 1024 * 1024
    # The wire between scheduler and executor.
    announced_bytes_per_plan_max: int = 256 * 1024
    message_bytes_max: int = 16 * 1024 * 1024
    # Steps that may be sent and not yet answered: the running one and its successor.
    num_steps_in_flight_max: int = 2
    block_size_max: int = 256
    # Drafts of one sequence in a step; a guess so far ahead is hardly ever right.
    num_draft_tokens_max: int = 16
    # Output tokens in one decode span; keeps traces of long requests readable.
    num_tokens_per_decode_span_max: int = 128


LIMITS = Limits()

assert LIMITS.message_bytes_max >= 2 * LIMITS.request_bytes_max, (
    "a request and its answer must each fit into one message"
)
assert LIMITS.grammar_bytes_max < LIMITS.announced_bytes_per_plan_max, (
    "a grammar comes with the announcement of its sequence"
)
assert LIMITS.announced_bytes_per_plan_max < LIMITS.message_bytes_max, (
    "announcements are only a part of a plan"
)
