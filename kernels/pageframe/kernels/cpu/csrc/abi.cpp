// The C interface of what is general: memory, threads, linear layers.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <new>

#include "buffer.h"
#include "linear.h"
#include "pageframe_cpu.h"
#include "pool.h"
#include "pool_handle.h"

namespace {

constexpr size_t kHugePageBytes = size_t{2} << 20;

bool is_shape(const pf_linear_shape* shape) {
    return shape && shape->num_in > 0 && shape->num_out > 0 &&
           (shape->dtype == PF_F32 || shape->dtype == PF_BF16);
}

bool is_part(const pf_linear_shape* shape, int32_t part, int64_t first_out, int64_t count) {
    return is_shape(shape) && part >= 0 && part <= (shape->gated ? 1 : 0) && first_out >= 0 &&
           count >= 0 && first_out + count <= shape->num_out;
}

bool is_call(const pf_linear_call& call) {
    const bool stores = call.epilogue == PF_STORE && (call.y_dtype == PF_F32 || call.y_dtype == PF_BF16);
    const bool adds = call.epilogue == PF_ADD && call.y_dtype == PF_F32;
    return is_shape(&call.shape) && (stores || adds) && call.packed && call.num_rows >= 0 &&
           call.x_dtype == pf::row_dtype(call.shape.dtype) &&
           (call.num_rows == 0 || (call.x && call.y)) && call.x_stride >= call.shape.num_in &&
           call.y_stride >= call.shape.num_out;
}

}  // namespace

int32_t pf_abi_version(void) { return PF_ABI_VERSION; }

int32_t pf_num_lanes(void) { return pf::kLanes; }

void* pf_alloc(int64_t num_bytes) {
    if (num_bytes <= 0) return nullptr;
    const auto size = static_cast<size_t>(num_bytes);
    void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
#if defined(MADV_HUGEPAGE)
    // Weights are read from end to end at every step: fewer pages, fewer misses of the TLB.
    if (size >= kHugePageBytes) madvise(memory, size, MADV_HUGEPAGE);
#endif
    return memory;
}

void pf_free(void* memory, int64_t num_bytes) {
    if (memory) munmap(memory, static_cast<size_t>(num_bytes));
}

pf_pool* pf_pool_create(int32_t num_threads) {
    return num_threads < 1 ? nullptr : new (std::nothrow) pf_pool(num_threads);
}

int32_t pf_pool_num_threads(const pf_pool* pool) { return pool->pool.num_threads(); }

void pf_pool_destroy(pf_pool* pool) { delete pool; }

// Each task of a phase checks that two tasks of the phase before have written, then writes; each
// thread checks behind the phase that all have.
int64_t pf_pool_exercise(pf_pool* pool, int64_t num_phases, int64_t num_tasks, int64_t* by_thread) {
    if (!pool || !by_thread || num_phases < 0 || num_tasks < 0) return PF_ERROR_ARGUMENT;
    pf::Buffer even, odd;
    int64_t* written[2] = {even.take<int64_t>(num_tasks + 1), odd.take<int64_t>(num_tasks + 1)};
    if (!written[0] || !written[1]) return PF_ERROR_MEMORY;
    std::fill_n(written[0], num_tasks, int64_t{0});
    std::atomic<int64_t> num_wrong{0};
    pool->pool.run([&](pf::Worker& worker) {
        for (int64_t phase = 0; phase < num_phases; phase++) {
            const int64_t* before = written[phase % 2];
            int64_t* now = written[(phase + 1) % 2];
            worker.parallel_for(num_tasks, [&](int64_t task) {
                const int64_t other = (task + phase + 1) % num_tasks;
                if (before[task] != phase || before[other] != phase) num_wrong++;
                __atomic_store_n(now + task, phase + 1, __ATOMIC_RELAXED);
                by_thread[worker.index()]++;
            });
            // A phase is over for all at once. Later ones may have written since, never less.
            for (int64_t task = 0; task < num_tasks; task++)
                if (__atomic_load_n(now + task, __ATOMIC_RELAXED) <= phase) num_wrong++;
        }
    });
    for (int64_t task = 0; task < num_tasks; task++)
        if (written[num_phases % 2][task] != num_phases) num_wrong++;
    return num_wrong;
}

int32_t pf_row_dtype(int32_t weights_dtype) { return pf::row_dtype(weights_dtype); }

int64_t pf_linear_packed_bytes(const pf_linear_shape* shape) {
    if (!is_shape(shape)) return PF_ERROR_ARGUMENT;
    return pf::linear_packed_bytes(*shape);
}

int32_t pf_linear_pack_rows(const pf_linear_shape* shape, void* packed, int32_t part,
                            int64_t first_out, int64_t num_rows, const void* weights,
                            int32_t weights_dtype, int64_t stride) {
    if (!is_part(shape, part, first_out, num_rows) || !packed || !weights) return PF_ERROR_ARGUMENT;
    if (stride < shape->num_in) return PF_ERROR_ARGUMENT;
    if (weights_dtype != PF_F32 && weights_dtype != PF_BF16) return PF_ERROR_ARGUMENT;
    pf::linear_pack_rows(*shape, packed, part, first_out, num_rows, weights, weights_dtype, stride);
    return PF_OK;
}

int32_t pf_linear_pack_bias(const pf_linear_shape* shape, void* packed, int32_t part,
                            int64_t first_out, int64_t num_values, const float* bias) {
    if (!is_part(shape, part, first_out, num_values) || !packed || !bias || !shape->has_bias)
        return PF_ERROR_ARGUMENT;
    pf::linear_pack_bias(*shape, packed, part, first_out, num_values, bias);
    return PF_OK;
}

int32_t pf_linear(pf_pool* pool, const pf_linear_call* call) {
    if (!pool || !call || !is_call(*call)) return PF_ERROR_ARGUMENT;
    pool->pool.run([call](pf::Worker& worker) { pf::linear(worker, *call); });
    return PF_OK;
}
