// Memory that is used anew in every step and allocated once: it grows to the largest size asked for.
#pragma once

#include <bit>
#include <cstdint>

#include "pageframe_cpu.h"

namespace pf {

class Buffer {
public:
    Buffer() = default;
    ~Buffer() { pf_free(memory_, num_bytes_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    // Room for `count` elements, 64-byte aligned, with undefined content; null if there is no
    // memory. What was taken before is gone.
    template <class T>
    T* take(int64_t count) {
        const auto wanted = static_cast<uint64_t>(count) * sizeof(T);
        if (wanted > static_cast<uint64_t>(num_bytes_)) {
            pf_free(memory_, num_bytes_);
            // Powers of two: a step that is a little larger than all before must not allocate anew.
            num_bytes_ = static_cast<int64_t>(std::bit_ceil(wanted));
            memory_ = pf_alloc(num_bytes_);
            if (memory_ == nullptr) num_bytes_ = 0;
        }
        return static_cast<T*>(memory_);
    }

private:
    void* memory_ = nullptr;
    int64_t num_bytes_ = 0;
};

}  // namespace pf
