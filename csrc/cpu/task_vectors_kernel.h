// The CPU kernels of merge_deltas and count_around as each variant exports them.
#pragma once

#include "mergetune/task_vectors.h"

namespace mergetune {

#define MT_DECLARE_FOR(Value)                                                                                        \
    void merge_deltas(const TaskVectors<Value>&, Real<Value>* out);                                                  \
    void count_around(const Value* values, const Value* base, std::int64_t n, Real<Value> low, Real<Value> high,     \
                      std::int64_t counts[4], Real<Value>* between);
#define MT_DECLARE(variant)     \
    namespace variant {         \
    MT_DECLARE_FOR(float)       \
    MT_DECLARE_FOR(double)      \
    MT_DECLARE_FOR(Half)        \
    MT_DECLARE_FOR(BFloat16)    \
    }
MT_DECLARE(portable)
MT_DECLARE(avx2)
MT_DECLARE(avx512)
#undef MT_DECLARE
#undef MT_DECLARE_FOR

}  // namespace mergetune
