// The CPU kernels of prefix_attention, compiled once for each instruction set (MT_VARIANT names it).
//
// Standard containers and algorithms are not used: the linker keeps one copy of each of their functions for all object
// files, and this copy must not be one that was compiled for AVX-512.
#include "cpu/prefix_attention_kernel.h"

#include "cpu/attention_rows.h"
#include "cpu/kernel_basics.h"

namespace mergetune {
namespace MT_VARIANT {
namespace {

template <class T>
MT_HD T* at(const Heads<T>& heads, std::int64_t m, std::int64_t row, std::int64_t h) {
    return heads.data + m * heads.stride_m + row * heads.stride_row + h * heads.stride_h;
}

// One sequence of one prompt: its tokens, and its queries among [Tq].
struct Sequence {
    std::int64_t m, begin, length, first_query, queries;

    template <class T>
    MT_HD Sequence(const PrefixAttention<T>& op, std::int64_t m, std::int64_t c)
        : m(m), begin(op.offsets[c]), length(op.offsets[c + 1] - begin) {
        const bool all = op.Tq == op.tokens;
        first_query = all ? begin : c;
        queries = all ? length : 1;
    }

    // How many of the sequence's tokens its query i sees.
    MT_HD std::int64_t seen(std::int64_t i, bool causal) const {
        return causal ? length - queries + i + 1 : length;
    }

    // How many of its queries do not see its token j: the first ones.
    MT_HD std::int64_t unseeing(std::int64_t j, bool causal) const {
        return causal && j > length - queries ? j - (length - queries) : 0;
    }
};

// A thread's scratch, and the rows of the head that it is at. `fixed_d` is d if known when compiling, else 0.
template <class T, int fixed_d, class Real = typename Arithmetic<T>::type>
struct Head {
    const PrefixAttention<T> op;  // a copy: what is written elsewhere cannot change it
    const Scratch place;
    Real* const scratch;
    const Real scale;
    Real *const keys, *const values, *const d_keys, *const d_values, *const queries, *const d_outs, *const result,
        *const probabilities, *const d_scores, *const products;

    MT_HD Head(const PrefixAttention<T>& op, const AttentionWorkspace<Real>& workspace, bool backward)
        : op(op),
          place(Scratch::of<Real>(op.d, workspace.most_keys, backward)),
          scratch(workspace.scratch + this_thread() * place.size),
          scale(Real(1 / std::sqrt(double(op.d)))),
          keys(scratch + place.keys),
          values(scratch + place.values),
          d_keys(scratch + place.d_keys),
          d_values(scratch + place.d_values),
          queries(scratch + place.queries),
          d_outs(scratch + place.d_outs),
          result(scratch + place.result),
          probabilities(scratch + place.probabilities),
          d_scores(scratch + place.d_scores),
          products(scratch + place.products) {
        fill(scratch, place.size, Real(0));
    }

    MT_HD std::int64_t d() const { return fixed_d ? fixed_d : op.d; }
    MT_HD std::int64_t width() const { return (d() + load_lanes<T> - 1) / load_lanes<T> * load_lanes<T>; }

    MT_HD void load_rows(const Heads<const T>& from, std::int64_t m, std::int64_t row, std::int64_t count,
                         std::int64_t h, Real* to) const {
        for (std::int64_t i = 0; i < count; ++i) {
            load_row<T, Real>(at(from, m, row + i, h), d(), Real(1), to + i * width());
        }
    }

    MT_HD void load_prefix(std::int64_t m, std::int64_t h) const {
        load_rows(op.prefix_k, m, 0, op.S, h, keys);
        load_rows(op.prefix_v, m, 0, op.S, h, values);
    }

    MT_HD void load_sequence(const Sequence& sequence, std::int64_t h) const {
        load_rows(op.k, sequence.m, sequence.begin, sequence.length, h, keys + op.S * width());
        load_rows(op.v, sequence.m, sequence.begin, sequence.length, h, values + op.S * width());
    }

    // Probabilities of `count` queries from `first` on. One step for all of them and then the next, so that the
    // processor has several queries' chains of additions to work at.
    MT_HD void attend(const Sequence& sequence, std::int64_t h, std::int64_t first, std::int64_t count) const {
        for (std::int64_t i = 0; i < count; ++i) {
            const std::int64_t seen = op.S + sequence.seen(first + i, op.causal);
            Real* const query = queries + i * width();
            load_row(at(op.q, sequence.m, sequence.first_query + first + i, h), d(), scale, query);
            dot_products(query, keys, seen, width(), Real(-INFINITY), products, probabilities + i * place.pitch);
        }
        for (std::int64_t i = 0; i < count; ++i) {
            softmax(probabilities + i * place.pitch, op.S + sequence.seen(first + i, op.causal));
        }
    }

    MT_HD void forward(const Sequence& sequence, std::int64_t h, const Heads<T>& out) const {
        load_sequence(sequence, h);
        for (std::int64_t first = 0; first < sequence.queries; first += query_rows) {
            const std::int64_t left = sequence.queries - first, count = left < query_rows ? left : query_rows;
            attend(sequence, h, first, count);
            for (std::int64_t i = 0; i < count; ++i) {
                weighted_sum<false>(probabilities + i * place.pitch, 1, values,
                                    op.S + sequence.seen(first + i, op.causal), width(), result);
                store_row(result, d(), Real(1), at(out, sequence.m, sequence.first_query + first + i, h));
            }
        }
    }

    // Leaves the gradients to the sequence's keys and values behind those to the prefix's, to which it adds.
    MT_HD void backward(const Sequence& sequence, std::int64_t h, const Heads<const T>& d_out,
                        const PrefixAttentionGradients<T>& gradients) const {
        const std::int64_t pitch = place.pitch;
        load_sequence(sequence, h);
        for (std::int64_t first = 0; first < sequence.queries; first += query_rows) {
            const std::int64_t left = sequence.queries - first, count = left < query_rows ? left : query_rows;
            attend(sequence, h, first, count);
            for (std::int64_t i = 0; i < count; ++i) {
                Real* const slope = d_outs + i * width();
                load_row(at(d_out, sequence.m, sequence.first_query + first + i, h), d(), Real(1), slope);
                dot_products(slope, values, op.S + sequence.seen(first + i, op.causal), width(), Real(0), products,
                             d_scores + i * pitch);
            }
            for (std::int64_t i = 0; i < count; ++i) {
                softmax_backward(probabilities + i * pitch, d_scores + i * pitch,
                                 op.S + sequence.seen(first + i, op.causal));
            }
            for (std::int64_t i = 0; i < count; ++i) {
                weighted_sum<false>(d_scores + i * pitch, 1, keys, op.S + sequence.seen(first + i, op.causal), width(),
                                    result);
                store_row(result, d(), scale, at(gradients.q, sequence.m, sequence.first_query + first + i, h));
            }
            for (std::int64_t j = 0; j < op.S; ++j) add_to_key<true>(j, 0, count);
            for (std::int64_t j = 0; j < sequence.length; ++j) {
                const std::int64_t unseeing = sequence.unseeing(j, op.causal) - first;
                const std::int64_t begin = unseeing < 0 ? 0 : unseeing < count ? unseeing : count;
                first ? add_to_key<true>(op.S + j, begin, count) : add_to_key<false>(op.S + j, begin, count);
            }
        }
        for (std::int64_t j = 0; j < sequence.length; ++j) {
            const std::int64_t row = sequence.begin + j, own = (op.S + j) * width();
            store_row(d_keys + own, d(), Real(1), at(gradients.k, sequence.m, row, h));
            store_row(d_values + own, d(), Real(1), at(gradients.v, sequence.m, row, h));
        }
    }

    // Gradients to key and value j from the queries [begin, end) held, on top of what they were where `add`.
    template <bool add>
    MT_HD void add_to_key(std::int64_t j, std::int64_t begin, std::int64_t end) const {
        const std::int64_t pitch = place.pitch, weight = begin * pitch + j, row = begin * width();
        weighted_sum<add>(d_scores + weight, pitch, queries + row, end - begin, width(), d_keys + j * width());
        weighted_sum<add>(probabilities + weight, pitch, d_outs + row, end - begin, width(), d_values + j * width());
    }
};

template <int fixed_d, class T, class Real>
void run(const PrefixAttention<T>& op, const Heads<T>& out, const AttentionWorkspace<Real>& workspace,
         [[maybe_unused]] int threads) {
    const SequenceBlocks blocks(op.C);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Head<T, fixed_d> head(op, workspace, false);
#pragma omp for schedule(dynamic, 1)
        for (std::int64_t unit = 0; unit < op.M * blocks.count; ++unit) {
            const std::int64_t m = unit / blocks.count, first = unit % blocks.count * blocks.sequences;
            const std::int64_t end = first + blocks.sequences < op.C ? first + blocks.sequences : op.C;
            for (std::int64_t h = 0; h < op.H; ++h) {
                head.load_prefix(m, h);
                for (std::int64_t c = first; c < end; ++c) head.forward(Sequence(op, m, c), h, out);
            }
        }
    }
}

template <int fixed_d, class T, class Real>
void run_backward(const PrefixAttention<T>& op, const Heads<const T>& d_out,
                  const PrefixAttentionGradients<T>& gradients, const AttentionWorkspace<Real>& workspace,
                  [[maybe_unused]] int threads) {
    const SequenceBlocks blocks(op.C);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Head<T, fixed_d> head(op, workspace, true);
        const std::int64_t width = head.width(), half = op.S * width;
#pragma omp for schedule(dynamic, 1)
        for (std::int64_t unit = 0; unit < op.M * blocks.count; ++unit) {
            const std::int64_t m = unit / blocks.count, first = unit % blocks.count * blocks.sequences;
            const std::int64_t end = first + blocks.sequences < op.C ? first + blocks.sequences : op.C;
            for (std::int64_t h = 0; h < op.H; ++h) {
                head.load_prefix(m, h);
                fill(head.d_keys, half, Real(0));
                fill(head.d_values, half, Real(0));
                for (std::int64_t c = first; c < end; ++c) head.backward(Sequence(op, m, c), h, d_out, gradients);
                Real* const d_prefix = workspace.d_prefix + (unit * op.H + h) * 2 * half;
                for (std::int64_t i = 0; i < half; ++i) d_prefix[i] = head.d_keys[i];
                for (std::int64_t i = 0; i < half; ++i) d_prefix[half + i] = head.d_values[i];
            }
        }

        // The blocks' partial sums, added in the order of the blocks to those of the first.
#pragma omp for schedule(static)
        for (std::int64_t unit = 0; unit < op.M * op.H; ++unit) {
            const std::int64_t m = unit / op.H, h = unit % op.H;
            Real* const total = workspace.d_prefix + (m * blocks.count * op.H + h) * 2 * half;
            for (std::int64_t block = 1; block < blocks.count; ++block) {
                const Real* const part = total + block * op.H * 2 * half;
#pragma omp simd
                for (std::int64_t i = 0; i < 2 * half; ++i) total[i] += part[i];
            }
            for (std::int64_t j = 0; j < op.S; ++j) {
                store_row(total + j * width, head.d(), Real(1), at(gradients.prefix_k, m, j, h));
                store_row(total + half + j * width, head.d(), Real(1), at(gradients.prefix_v, m, j, h));
            }
        }
    }
}

}  // namespace

// 64 is what CLIP's text towers have.
#define MT_DEFINE_FOR(T)                                                                                    \
    void prefix_attention(const PrefixAttention<T>& op, const Heads<T>& out,                                \
                          const AttentionWorkspace<Arithmetic<T>::type>& workspace, int threads) {          \
        op.d == 64 ? run<64>(op, out, workspace, threads) : run<0>(op, out, workspace, threads);            \
    }                                                                                                       \
    void prefix_attention_backward(const PrefixAttention<T>& op, const Heads<const T>& d_out,               \
                                   const PrefixAttentionGradients<T>& gradients,                            \
                                   const AttentionWorkspace<Arithmetic<T>::type>& workspace, int threads) { \
        op.d == 64 ? run_backward<64>(op, d_out, gradients, workspace, threads)                             \
                   : run_backward<0>(op, d_out, gradients, workspace, threads);                             \
    }
MT_DEFINE_FOR(float)
MT_DEFINE_FOR(double)
MT_DEFINE_FOR(BFloat16)
#undef MT_DEFINE_FOR

}  // namespace MT_VARIANT
}  // namespace mergetune
