// The op prefix_attention: its arguments and its CPU entry points, forward and backward.
//
// Shapes: M prompts, C sequences, T packed tokens, Tq queries, S prefix tokens, H heads, d head width.
#pragma once

#include <cstdint>
#include <string>

#include "mergetune/half_types.h"

namespace mergetune {

// [M, rows, H, d] with strides in elements; the d values of a head are adjacent.
template <class T>
struct Heads {
    T* data;
    std::int64_t stride_m, stride_row, stride_h;
};

// Attention of C packed sequences to themselves and to a prefix that they share:
//
//   out[m,i,h] = sum_j softmax_j(d^-0.5 q[m,i,h] . key[m,j,h]) value[m,j,h]
//
// where j runs over the prefix of prompt m and over the query's own sequence: up to the query itself if causal.
template <class T>
struct PrefixAttention {
    Heads<const T> q;                   // [M, Tq, H, d]; Tq is T, or C: only the last query of each sequence
    Heads<const T> k, v;                // [M, T, H, d]
    Heads<const T> prefix_k, prefix_v;  // [M, S, H, d]
    const std::int64_t* offsets;        // [C + 1], ascending strictly from 0 to T: where each sequence begins and ends
    std::int64_t M, Tq, tokens, S, C, H, d;  // tokens is T; S may be 0
    bool causal;
};

// Gradients to the inputs of the same names, in their shapes. None may overlap another or an input.
template <class T>
struct PrefixAttentionGradients {
    Heads<T> q, k, v, prefix_k, prefix_v;
};

// T is float, double or BFloat16, whose arithmetic is float's. Writes every value of `out`, shaped as q.
// `variant` is "" (the process's choice, see cpu/variants.h) or one of cpu_variants().
// The bits of the result depend on the variant and the sizes, never on num_threads.
// Throws std::invalid_argument for sizes or offsets that break the rules above.
template <class T>
void prefix_attention_cpu(const PrefixAttention<T>& op, const Heads<T>& out, int num_threads,
                          const std::string& variant);

// The same, from the gradient of `out`. Computes the probabilities again, so nothing is kept from the forward; writes
// every value of the gradients.
template <class T>
void prefix_attention_backward_cpu(const PrefixAttention<T>& op, const Heads<const T>& d_out,
                                   const PrefixAttentionGradients<T>& gradients, int num_threads,
                                   const std::string& variant);

}  // namespace mergetune
