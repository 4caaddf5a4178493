"""Every span name and attribute key of the system, so that each is spelt in one place.

The ``kv.<operation>`` span names come from ``core.trace.KvOperation.span_name``. Keys of the
``gen_ai`` group follow the OpenTelemetry semantic conventions for generative AI.
"""

from typing import Final

# Service names, one per process.
SERVICE_GATEWAY: Final = "pageframe-gateway"
SERVICE_SCHEDULER: Final = "pageframe-scheduler"
SERVICE_EXECUTOR: Final = "pageframe-executor"

# Spans of a request.
GENERATE: Final = "generate"
TOKENIZE: Final = "tokenize"
SEQUENCE: Final = "sequence"
STALL: Final = "stall"
PREFILL: Final = "prefill"
DECODE: Final = "decode"
PREEMPT: Final = "preempt"

# Spans of nobody's request.
STEP: Final = "step"
POLICY_DISAGREEMENT: Final = "policy.disagreement"
POLICY_FAULT: Final = "policy.fault"
POOL: Final = "pool"
PROCESS: Final = "process"
TRACE_DROP: Final = "trace.drop"

# The seams of a trace that was too long to be one: see ``trace_parts``.
CONTINUED: Final = "continued"
CONTINUATION: Final = "continuation"

# Spans that answer a call from outside; all others are internal to their process.
SERVER_SPANS: Final = frozenset({GENERATE})

# KV operations.
KV_BLOCK_IDS: Final = "kv.block_ids"
KV_BLOCK_IDS_SOURCE: Final = "kv.block_ids.source"
KV_BLOCK_IDS_TARGET: Final = "kv.block_ids.target"
KV_OPERATION: Final = "kv.operation"
KV_POOL_INCARNATION: Final = "kv.pool_incarnation"
KV_STEP: Final = "kv.step"
KV_CAUSE: Final = "kv.cause"
KV_SEQUENCE: Final = "kv.sequence"
KV_GENERATION: Final = "kv.generation"
KV_POSITION: Final = "kv.position"
KV_TENANT: Final = "kv.tenant"
KV_BLOCKS_FREE_AFTER: Final = "kv.blocks.free_after"

# Requests, sequences and their waits.
REQUEST_ID: Final = "pageframe.request_id"
TENANT: Final = "pageframe.tenant"
REPLICA: Final = "pageframe.replica"
REPLICA_MOVES: Final = "pageframe.replica.moves"
PRIORITY: Final = "pageframe.priority"
BEST_OF: Final = "pageframe.best_of"
NUM_BEAMS: Final = "pageframe.num_beams"
SEQUENCE_ID: Final = "pageframe.sequence_id"
SAMPLE_INDEX: Final = "pageframe.sample_index"
GENERATION: Final = "pageframe.generation"
STALL_CAUSE: Final = "pageframe.stall.cause"
STALL_MS: Final = "pageframe.stall.{}_ms"
COMPUTE_MS: Final = "pageframe.compute_ms"
ELAPSED_MS: Final = "pageframe.elapsed_ms"
DECODE_GAPS_MS: Final = "pageframe.decode.gaps_ms"
FINISH_REASON: Final = "pageframe.finish_reason"
# Half-open interval [begin, end) of token positions that a prefill or decode span covers.
TOKENS_BEGIN: Final = "pageframe.tokens.begin"
TOKENS_END: Final = "pageframe.tokens.end"
NUM_PROMPT_TOKENS: Final = "pageframe.num_prompt_tokens"
NUM_CACHED_TOKENS: Final = "pageframe.num_cached_tokens"
NUM_DRAFT_TOKENS: Final = "pageframe.num_draft_tokens"
NUM_ACCEPTED_TOKENS: Final = "pageframe.num_accepted_tokens"
NUM_OUTPUT_TOKENS: Final = "pageframe.num_output_tokens"
NUM_BLOCKS_PEAK: Final = "pageframe.num_blocks_peak"
NUM_PREEMPTIONS: Final = "pageframe.num_preemptions"

# Preemption.
PREEMPT_MODE: Final = "pageframe.preempt.mode"
PREEMPT_VICTIM: Final = "pageframe.preempt.victim"
PREEMPT_BENEFICIARY: Final = "pageframe.preempt.beneficiary"
PREEMPT_NUM_BLOCKS: Final = "pageframe.preempt.num_blocks"
PREEMPT_ESTIMATE_MS: Final = "pageframe.preempt.estimate_ms"
PREEMPT_ACTUAL_MS: Final = "pageframe.preempt.actual_ms"
# False when it ended, or lost blocks again, before it had caught up.
PREEMPT_IS_BACK: Final = "pageframe.preempt.is_back"

# Policies.
POLICY_GROUP: Final = "pageframe.policy.group"
POLICY_NAME: Final = "pageframe.policy.name"
POLICY_SHADOW_NAME: Final = "pageframe.policy.shadow_name"
POLICY_CHOICE: Final = "pageframe.policy.choice"
POLICY_SHADOW_CHOICE: Final = "pageframe.policy.shadow_choice"
POLICY_IS_SHADOW: Final = "pageframe.policy.is_shadow"

# Steps.
STEP_NUMBER: Final = "pageframe.step"
STEP_NUM_SEQUENCES: Final = "pageframe.step.num_sequences"
STEP_NUM_TOKENS: Final = "pageframe.step.num_tokens"
STEP_NUM_DECODES: Final = "pageframe.step.num_decodes"
STEP_NUM_SAMPLED: Final = "pageframe.step.num_sampled"
STEP_APPLY_MS: Final = "pageframe.step.apply_ms"
STEP_EXECUTE_MS: Final = "pageframe.step.execute_ms"
STEP_SAMPLE_MS: Final = "pageframe.step.sample_ms"

# Losses of the trace itself.
TRACE_NUM_DROPPED: Final = "pageframe.trace.num_dropped"
TRACE_NUM_DROPPED_TOTAL: Final = "pageframe.trace.num_dropped_total"
TRACE_DROPPED_BY: Final = "pageframe.trace.dropped_by"

# Parts of a long trace: the request's own trace id in hexadecimal, which part, of what.
TRACE_CONTINUES: Final = "pageframe.trace.continues"
TRACE_PART: Final = "pageframe.trace.part"
TRACE_PART_KIND: Final = "pageframe.trace.part_kind"

# OpenTelemetry semantic conventions: why it failed, as a word that can be searched.
ERROR_TYPE: Final = "error.type"

# OpenTelemetry semantic conventions, generative AI.
GEN_AI_OPERATION_NAME: Final = "gen_ai.operation.name"
GEN_AI_PROVIDER_NAME: Final = "gen_ai.provider.name"
GEN_AI_REQUEST_MODEL: Final = "gen_ai.request.model"
GEN_AI_REQUEST_MAX_TOKENS: Final = "gen_ai.request.max_tokens"
GEN_AI_REQUEST_TEMPERATURE: Final = "gen_ai.request.temperature"
GEN_AI_REQUEST_TOP_K: Final = "gen_ai.request.top_k"
GEN_AI_REQUEST_TOP_P: Final = "gen_ai.request.top_p"
GEN_AI_REQUEST_FREQUENCY_PENALTY: Final = "gen_ai.request.frequency_penalty"
GEN_AI_REQUEST_PRESENCE_PENALTY: Final = "gen_ai.request.presence_penalty"
GEN_AI_REQUEST_STOP_SEQUENCES: Final = "gen_ai.request.stop_sequences"
GEN_AI_REQUEST_SEED: Final = "gen_ai.request.seed"
GEN_AI_REQUEST_CHOICE_COUNT: Final = "gen_ai.request.choice.count"
GEN_AI_RESPONSE_ID: Final = "gen_ai.response.id"
GEN_AI_RESPONSE_MODEL: Final = "gen_ai.response.model"
GEN_AI_RESPONSE_FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
GEN_AI_USAGE_INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
GEN_AI_USAGE_OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"
