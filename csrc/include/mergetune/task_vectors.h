// The ops merge_deltas, which merges task vectors element by element, and count_around, which helps to find thresholds.
//
// Stored values are float, double, Half or BFloat16. The arithmetic is double for double, else float. Shapes: K
// experts, n elements.
#pragma once

#include <cstdint>
#include <string>

#include "mergetune/half_types.h"

namespace mergetune {

template <class Value>
struct RealOf {
    using type = float;
};
template <>
struct RealOf<double> {
    using type = double;
};
template <class Value>
using Real = typename RealOf<Value>::type;

// What is merged, and how. Every array is contiguous. A delta is expert - base where it is kept, else 0.
template <class Value>
struct TaskVectors {
    const Value* base;            // [n]; null: deltas are the experts themselves, and nothing is added to the result
    const Value* const* experts;  // K of them, [n] each
    const std::uint8_t* kept;     // [K, n], 0 for what is dropped; null keeps all
    const double* limits;         // [K], the least magnitude of a delta that is kept; null keeps all
    const double* weights;        // [K]
    const double* votes;          // [K], each expert's weight in the election of a sign; null: none is elected
    const double* shares;         // [K], what an expert that agrees adds to the divisor; null: nothing is divided
    bool by_count;                // signs are elected by their number, not by the sum of the deltas
    double scale;
    std::int64_t K, n;
};

// out[i] = base[i] + scale * sum_k weights[k] delta[k,i], over the deltas of the elected sign, by their shares.
// Where the votes are 0 the positive sign is elected. NaN stays NaN.
template <class Value>
void merge_deltas_cpu(const TaskVectors<Value>& op, Real<Value>* out, const std::string& variant);

// How many of [n] values lie below `low`, equal it, lie between both, equal `high`; those between go to `between`,
// which has room for all n, in their order. low <= high. With a base, [n], what is counted are the magnitudes of the
// differences from it.
template <class Value>
void count_around_cpu(const Value* values, const Value* base, std::int64_t n, Real<Value> low, Real<Value> high,
                      std::int64_t counts[4], Real<Value>* between, const std::string& variant);

}  // namespace mergetune
