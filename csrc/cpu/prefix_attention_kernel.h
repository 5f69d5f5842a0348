// Declarations of the CPU kernels of prefix_attention in each variant, and their workspace.
#pragma once

#include "cpu/alignment.h"
#include "cpu/each_variant.h"
#include "mergetune/prefix_attention.h"

namespace mergetune {

// What the arithmetic is done in.
template <class T>
struct Arithmetic {
    using type = T;
};
template <>
struct Arithmetic<BFloat16> {
    using type = float;
};

constexpr std::int64_t query_rows = 16;  // most queries whose probabilities are held at once

// Sequences are cut into blocks by C alone, so that the order of every sum is the same for any number of threads.
struct SequenceBlocks {
    std::int64_t sequences, count;

    __attribute__((always_inline)) explicit SequenceBlocks(std::int64_t C) {
        constexpr std::int64_t fewest_sequences = 8, most_blocks = 32;  // each block keeps gradients of the prefix
        sequences = (C + most_blocks - 1) / most_blocks;
        if (sequences < fewest_sequences) sequences = fewest_sequences;
        count = (C + sequences - 1) / sequences;
    }
};

// One thread's workspace, as places in an array of Real. A row is one head of one token, `width` wide, 0 behind d. The
// rows of keys and values are first those of the prefix, then those of a sequence.
struct Scratch {
    std::int64_t width, pitch;  // of rows; of probabilities
    std::int64_t keys, values, d_keys, d_values, queries, d_outs, result, probabilities, d_scores, products, size;

    template <class Real>
    __attribute__((always_inline)) static Scratch of(std::int64_t d, std::int64_t most_keys, bool backward) {
        Scratch s{};
        s.width = 2 * whole_vectors<Real>((d + 1) / 2);  // values of BFloat16 come in two vectors at once
        s.pitch = whole_vectors<Real>(most_keys);
        const std::int64_t rows = most_keys * s.width;
        s.values = s.keys + rows;
        s.d_keys = s.values + rows;
        s.d_values = s.d_keys + (backward ? rows : 0);
        s.queries = s.d_values + (backward ? rows : 0);
        s.d_outs = s.queries + query_rows * s.width;
        s.result = s.d_outs + (backward ? query_rows * s.width : 0);
        s.probabilities = s.result + s.width;
        s.d_scores = s.probabilities + query_rows * s.pitch;
        s.products = s.d_scores + (backward ? query_rows * s.pitch : 0);
        s.size = s.products + s.pitch * whole_vectors<Real>(1);
        return s;
    }
};

// Uninitialised, aligned to the widest vector.
template <class Real>
struct AttentionWorkspace {
    Real* scratch;           // [threads, Scratch::size]
    Real* d_prefix;          // [M, blocks, H, 2 (keys, values), S, width]; backward only
    std::int64_t most_keys;  // S + the longest sequence
};

#define MT_EXPORTS(T)                                                                   \
    void prefix_attention(const PrefixAttention<T>&, const Heads<T>&,                   \
                          const AttentionWorkspace<Arithmetic<T>::type>&, int threads); \
    void prefix_attention_backward(const PrefixAttention<T>&, const Heads<const T>&,    \
                                   const PrefixAttentionGradients<T>&,                  \
                                   const AttentionWorkspace<Arithmetic<T>::type>&, int threads);
MT_DECLARE_IN_EACH_VARIANT(MT_EXPORTS(float) MT_EXPORTS(double) MT_EXPORTS(BFloat16))
#undef MT_EXPORTS

}  // namespace mergetune
