// A Llama-shaped model as one walk of all threads through all layers.
//
//     token ids ─▶ embedding ─▶ [ norm │ q,k,v │ (q,k norm) rotary, KV write │ attention │ output + │
//                                 norm │ gate,up SwiGLU │ down + ] x layers ─▶ norm
//
// Behind the attention of the last layer only wanted rows go on.
//
// A bar is the end of a phase. The stream of hidden states is float32; rows that enter a linear
// layer are made in the type that the layer wants (row_dtype). A phase writes only in tasks, and reads
// only what earlier phases wrote (pool.h).
#pragma once

#include <memory>
#include <vector>

#include "attention.h"
#include "buffer.h"
#include "linear.h"
#include "pageframe_cpu.h"
#include "pool.h"

// Opaque in C.
struct pf_model {
    explicit pf_model(const pf_model_config& from)
        : config(from), layers(from.layers, from.layers + from.num_layers),
          rows_dtype(pf::row_dtype(from.head.shape.dtype)) {}

    pf_model_config config;
    std::vector<pf_layer> layers;
    int32_t rows_dtype;  // of rows that enter linear layers
    std::vector<pf::AttentionPlan> plans;  // of this step, one for each window that layers have
    std::vector<int> plan_of_layer;
    pf::Buffer hidden, normed, heads, mixed, activated, angles, scratch, partials, head_rows;
};
