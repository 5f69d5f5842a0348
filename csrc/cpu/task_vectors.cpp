// Task-vector ops on the CPU: choice of the variant.
#include "cpu/task_vectors_kernel.h"

#include "cpu/variants.h"

namespace mergetune {

template <class Value>
void merge_deltas_cpu(const TaskVectors<Value>& op, Real<Value>* out, const std::string& requested) {
    const std::string& variant = choose_cpu_variant(requested);
    MT_CALL_VARIANT(variant, merge_deltas(op, out));
}

template <class Value>
void count_around_cpu(const Value* values, const Value* base, std::int64_t n, Real<Value> low, Real<Value> high,
                      std::int64_t counts[4], Real<Value>* between, const std::string& requested) {
    const std::string& variant = choose_cpu_variant(requested);
    MT_CALL_VARIANT(variant, count_around(values, base, n, low, high, counts, between));
}

#define MT_INSTANTIATE(Value)                                                                                  \
    template void merge_deltas_cpu<Value>(const TaskVectors<Value>&, Real<Value>*, const std::string&);        \
    template void count_around_cpu<Value>(const Value*, const Value*, std::int64_t, Real<Value>, Real<Value>,  \
                                          std::int64_t[4], Real<Value>*, const std::string&);
MT_INSTANTIATE(float)
MT_INSTANTIATE(double)
MT_INSTANTIATE(Half)
MT_INSTANTIATE(BFloat16)
#undef MT_INSTANTIATE

}  // namespace mergetune
