// Declarations of the CPU kernels of merge_deltas and count_around in each variant.
#pragma once

#include "cpu/each_variant.h"
#include "mergetune/task_vectors.h"

namespace mergetune {

#define MT_EXPORTS(Value)                                                                                        \
    void merge_deltas(const TaskVectors<Value>&, Real<Value>* out);                                              \
    void count_around(const Value* values, const Value* base, std::int64_t n, Real<Value> low, Real<Value> high, \
                      std::int64_t counts[4], Real<Value>* between);
MT_DECLARE_IN_EACH_VARIANT(MT_EXPORTS(float) MT_EXPORTS(double) MT_EXPORTS(Half) MT_EXPORTS(BFloat16))
#undef MT_EXPORTS

}  // namespace mergetune
