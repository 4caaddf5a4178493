// The pool as the C interface hands it out.
#pragma once

#include "pageframe_cpu.h"
#include "pool.h"

struct pf_pool {
    explicit pf_pool(int num_threads) : pool(num_threads) {}
    pf::Pool pool;
};
