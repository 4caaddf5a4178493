/* The C interface of the compiled CPU kernels: what Python calls through ctypes.
 *
 * Plain pointers and sizes; no call throws; nothing is kept of what is passed but handles. Memory is
 * the caller's. Strides are in elements. Functions that can fail return a negative PF_ERROR_*.
 * A struct may only grow at its end, with PF_ABI_VERSION one up. */
#pragma once

#include <stdint.h>

#define PF_ABI_VERSION 1
#define PF_API extern "C" __attribute__((visibility("default")))

enum pf_dtype { PF_F32 = 0, PF_BF16 = 1, PF_INT8 = 2 };

enum pf_error {
    PF_OK = 0,
    PF_ERROR_ARGUMENT = -1, /* a size, stride, dtype or null pointer that cannot be */
    PF_ERROR_MEMORY = -2,   /* there was none to be had */
};

/* ---- general --------------------------------------------------------------------------------- */

PF_API int32_t pf_abi_version(void);
PF_API int32_t pf_num_lanes(void); /* floats in a vector: 4, 8 or 16 */

/* Zeroed memory, 64-byte aligned, on huge pages where the system gives them; null if there is none. */
PF_API void* pf_alloc(int64_t num_bytes);
PF_API void pf_free(void* memory, int64_t num_bytes);

/* ---- threads --------------------------------------------------------------------------------- */

typedef struct pf_pool pf_pool;

PF_API pf_pool* pf_pool_create(int32_t num_threads); /* the caller included; null for < 1 */
PF_API int32_t pf_pool_num_threads(const pf_pool* pool);
PF_API void pf_pool_destroy(pf_pool* pool);
/* For tests: many short phases. Returns how many tasks did not see what the phase before had written;
 * adds to by_thread [num_threads] the tasks that each thread did. */
PF_API int64_t pf_pool_exercise(pf_pool* pool, int64_t num_phases, int64_t num_tasks,
                                int64_t* by_thread);

/* ---- linear layers: see linear.h ---------------------------------------------------------------- */

typedef struct pf_linear_shape {
    int64_t num_in;
    int64_t num_out; /* of the result; a gated layer has as many gate and as many up outputs */
    int32_t dtype;   /* of the packed weights: PF_F32 or PF_BF16 */
    int32_t gated;   /* 1: y = silu(gate) * up */
    int32_t has_bias;
    int32_t reserved;
} pf_linear_shape;

enum pf_epilogue {
    PF_STORE = 0, /* y = x W^T + bias; gated: y = silu(gate) * up */
    PF_ADD = 1,   /* y = y + (that); y is PF_F32 */
};

typedef struct pf_linear_call {
    pf_linear_shape shape;
    const void* packed;
    const void* x;    /* [num_rows, num_in] of x_dtype */
    void* y;          /* [num_rows, num_out] of y_dtype; no overlap with x */
    int64_t num_rows; /* 0 is allowed */
    int64_t x_stride; /* >= num_in */
    int64_t y_stride; /* >= num_out */
    int32_t x_dtype;  /* pf_row_dtype(shape.dtype) */
    int32_t y_dtype;  /* PF_F32 or PF_BF16 (rounded to the nearest, ties to even) */
    int32_t epilogue;
    int32_t reserved;
} pf_linear_call;

/* The dtype in which rows enter a layer with such weights: PF_BF16 for PF_BF16 weights where the
 * machine multiplies pairs of bf16, else PF_F32 (rows then keep the digits that bf16 would cost). */
PF_API int32_t pf_row_dtype(int32_t weights_dtype);
PF_API int64_t pf_linear_packed_bytes(const pf_linear_shape* shape);
PF_API int32_t pf_linear_pack_rows(const pf_linear_shape* shape, void* packed, int32_t part,
                                   int64_t first_out, int64_t num_rows, const void* weights,
                                   int32_t weights_dtype, int64_t stride);
PF_API int32_t pf_linear_pack_bias(const pf_linear_shape* shape, void* packed, int32_t part,
                                   int64_t first_out, int64_t num_values, const float* bias);
PF_API int32_t pf_linear(pf_pool* pool, const pf_linear_call* call);

/* ---- the model: see model.h ---------------------------------------------------------------------- */

/* A layer of packed weights, as pf_linear_call has them. */
typedef struct pf_linear_weights {
    pf_linear_shape shape;
    const void* packed;
} pf_linear_weights;

typedef struct pf_layer {
    const float* attention_norm;    /* [hidden_size] */
    const float* query_norm;        /* [head_dim], or null: heads are not normalised */
    const float* key_norm;          /* likewise */
    const float* feed_forward_norm; /* [hidden_size] */
    pf_linear_weights query_key_value;
    pf_linear_weights attention_output;
    pf_linear_weights gate_up; /* gated */
    pf_linear_weights down;
    int64_t window; /* positions that a token sees, itself included; 0 for all */
} pf_layer;

typedef struct pf_model_config {
    int64_t hidden_size;
    int64_t num_layers;
    int64_t num_heads;
    int64_t num_kv_heads;
    int64_t head_dim; /* a multiple of 8 */
    float norm_epsilon;
    float score_scale;         /* multiplies scores before the softmax */
    const float* frequencies;  /* [head_dim / 2], angle per position */
    const float* final_norm;   /* [hidden_size] */
    const pf_layer* layers;    /* [num_layers] */
    pf_linear_weights head;    /* num_out is the size of the vocabulary */
    const void* embedding;     /* [vocabulary, hidden_size]; null: the rows of `head` */
    int32_t embedding_dtype;   /* PF_F32 or PF_BF16 */
    int32_t reserved;
} pf_model_config;

/* The pool of kernels/layouts.py. */
typedef struct pf_kv_arena {
    void* blocks;          /* [num_blocks, block_bytes] */
    int64_t block_bytes;   /* of one block's row, padding included */
    int64_t payload_bytes; /* where in it the scales begin */
    int64_t block_size;    /* tokens */
    int64_t num_kv_heads;
    int64_t head_dim;
    int32_t dtype; /* PF_F32, PF_BF16, or PF_INT8 with a scale per token, head and side */
    int32_t reserved;
} pf_kv_arena;

/* Where a step's wall time went: what the calling thread saw, all layers together. */
enum pf_phase {
    PF_PHASE_EMBEDDING = 0,
    PF_PHASE_NORM,
    PF_PHASE_QUERY_KEY_VALUE,
    PF_PHASE_ROTARY_AND_WRITE,
    PF_PHASE_ATTENTION,
    PF_PHASE_ATTENTION_OUTPUT,
    PF_PHASE_GATE_UP,
    PF_PHASE_DOWN,
    PF_NUM_PHASES
};

/* One step of executor/batch.py: T tokens, S sequences, R wanted rows, G groups of layers. */
typedef struct pf_step {
    const pf_kv_arena* arena;
    const int32_t* layer_groups; /* [num_layers], which block tables */
    const int32_t* layer_places; /* [num_layers], which layer of a block */
    const int32_t* token_ids;    /* [T] */
    const int32_t* positions;    /* [T] */
    const int64_t* slots;        /* [T * G] */
    const int32_t* query_start;  /* [S + 1] */
    const int32_t* context_lens; /* [S] */
    const int32_t* block_tables; /* [S, table_entries] */
    const int64_t* rows;         /* [R], tokens whose output is wanted */
    float* outputs;              /* [R, hidden_size], normalised */
    int64_t* phase_ns;           /* [PF_NUM_PHASES], added to; may be null */
    int64_t num_tokens;
    int64_t num_sequences;
    int64_t num_rows;
    int64_t table_entries;
    int64_t num_groups;
} pf_step;

typedef struct pf_model pf_model;

/* Keeps copies of `config` and of the layers, and the addresses of weights: those must outlive it.
 * Null for sizes that cannot be. */
PF_API pf_model* pf_model_create(const pf_model_config* config);
PF_API void pf_model_destroy(pf_model* model);

/* Runs all layers. PF_ERROR_ARGUMENT for a token id outside the vocabulary or a pool of other heads. */
PF_API int32_t pf_forward(pf_pool* pool, pf_model* model, const pf_step* step);

/* Logits [num_rows, vocabulary] of rows of `outputs`. */
PF_API int32_t pf_logits(pf_pool* pool, pf_model* model, const float* outputs, int64_t num_rows,
                         float* logits);

/* ---- drawing tokens: see draw.h ------------------------------------------------------------------ */

/* n draws from rows of logits; arrays of n. */
typedef struct pf_draw_call {
    const float* logits; /* [.., num_columns] */
    const float* best;   /* by row: the highest logit, finite */
    const int64_t* rows;
    const float* temperature; /* above zero */
    const int64_t* top_k;     /* in [1, num_columns], which keeps all */
    const double* top_p;      /* in (0, 1]; 1 keeps all */
    const float* min_p;       /* in [0, 1]; 0 keeps all */
    const double* uniforms;   /* in [0, 1) */
    void* scratch;            /* pf_draw_scratch_bytes for each thread of the pool, 64-byte aligned */
    int64_t num_draws;
    int64_t num_columns;
    int64_t stride; /* from a row to the next, >= num_columns */
} pf_draw_call;

PF_API int64_t pf_draw_scratch_bytes(int64_t num_columns);
/* Token ids [num_draws]. PF_ERROR_ARGUMENT also where `best` is no logit of its row. */
PF_API int32_t pf_draw(pf_pool* pool, const pf_draw_call* call, int64_t* token_ids);
/* The next token of each of num_rows rows of logits: the best one, the lowest of equals, or a drawn one.
 * How to draw stands in columns, of which row i reads entry rows[i]. */
typedef struct pf_choose_call {
    const float* logits;      /* [num_rows, num_columns] */
    const uint8_t* is_drawn;  /* [num_rows]; null: none is, and what follows up to scratch is not read */
    const int32_t* rows;      /* [num_rows] */
    const int32_t* positions; /* [num_rows], of the tokens: they key the random numbers, as do */
    const uint64_t* seeds;
    const uint32_t* sample_indices;
    const float* temperature; /* these four as in pf_draw_call, top_k with no upper bound */
    const int64_t* top_k;
    const double* top_p;
    const float* min_p;
    void* scratch;      /* as in pf_draw_call */
    float* maxima;      /* [num_rows], written: the best logits, NaN for a row with a NaN */
    int64_t* token_ids; /* [num_rows], written; with a best logit that is not finite nothing is drawn */
    int64_t num_rows;
    int64_t num_columns;
    int64_t stride; /* from a row to the next, >= num_columns */
} pf_choose_call;

PF_API int32_t pf_choose(pf_pool* pool, const pf_choose_call* call);
/* pf_forward, pf_logits of all its rows into what `choice` has for logits, and pf_choose: a step whose
 * caller has nothing to do in between. */
PF_API int32_t pf_decode(pf_pool* pool, pf_model* model, const pf_step* step,
                         const pf_choose_call* choice);
/* Sums of all weights [num_draws], in parts of 2^-40; filters and uniforms are not read. */
PF_API int32_t pf_total_weights(pf_pool* pool, const pf_draw_call* call, int64_t* totals);

/* ---- single parts, for tests ------------------------------------------------------------------- */

#define PF_SHARED_TILE_FIELDS 6

typedef struct pf_attention_call {
    const pf_kv_arena* arena;
    const float* queries; /* [T, num_heads * head_dim], already scaled */
    void* mixed;          /* [num_places] of the same shape, of mixed_dtype */
    const int32_t* query_start;
    const int32_t* context_lens;
    const int32_t* block_tables;
    int64_t num_sequences;
    int64_t table_entries;
    int64_t num_groups;
    int64_t group;
    int64_t place;
    int64_t num_places; /* layers from there on, one after the other as in a step of a model */
    int64_t num_heads;
    int64_t window;
    int32_t mixed_dtype;
    int32_t min_shared_keys; /* that sequences take in together; 0: as in a step of a model */
} pf_attention_call;

PF_API int32_t pf_attention(pf_pool* pool, const pf_attention_call* call);
/* Tiles of keys that several sequences share, as a plan for so many threads has them: of each
 * PF_SHARED_TILE_FIELDS numbers: first and end key, first and end KV head, first and end member. Members
 * [T] are tokens. A negative group stands for layers of all groups. Returns how many tiles there are,
 * and writes no more than `capacity` of them. */
PF_API int64_t pf_attention_shared_tiles(const pf_attention_call* call, int64_t num_threads,
                                         int64_t capacity, int64_t* tiles, int64_t* members);
/* Keys (side 0) or values (1), [num_tokens, num_kv_heads, head_dim], into slots [num_tokens]. */
PF_API int32_t pf_kv_write(const pf_kv_arena* arena, int64_t place, int32_t side,
                           const int64_t* slots, int64_t num_tokens, const float* channels);
/* e to the power x, x <= 0, as the softmax has it. */
PF_API void pf_exp(const float* x, int64_t count, float* to);
