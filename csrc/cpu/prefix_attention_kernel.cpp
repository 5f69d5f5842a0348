// The CPU kernels of prefix_attention, compiled once for each instruction set (MT_VARIANT names it).
//
// No standard containers or algorithms here: their functions are merged by name across object files, and a
// copy compiled for AVX-512 must never be the one that every machine runs.
#include "prefix_attention_kernel.h"

#include <utility>  // integer_sequence, a type

#include "mergetune/row_math.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace mergetune {
namespace MT_VARIANT {
namespace {

// ---- vectors: those of the compiler, as wide as the instruction set's

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

template <class Real>
struct Vectors;
template <>
struct Vectors<float> {
    typedef float Vector __attribute__((vector_size(vector_bytes)));
    typedef std::int32_t Index __attribute__((vector_size(vector_bytes)));
};
template <>
struct Vectors<double> {
    typedef double Vector __attribute__((vector_size(vector_bytes)));
    typedef std::int64_t Index __attribute__((vector_size(vector_bytes)));
};
template <class Real>
using Vector = typename Vectors<Real>::Vector;
template <class Real>
constexpr int lanes = vector_bytes / int(sizeof(Real));
template <class Real>
using Lanes = std::make_integer_sequence<int, lanes<Real>>;

template <class Real>
MT_HD Vector<Real> load(const Real* from) {
    Vector<Real> x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

template <class Real>
MT_HD void store(const Vector<Real>& x, Real* to) {
    std::memcpy(to, &x, sizeof x);
}

// Lane i is lane `from`[i] of a and then b.
template <class Real, int... from>
MT_HD Vector<Real> shuffled(const Vector<Real>& a, const Vector<Real>& b) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, from...);
#else
    return __builtin_shuffle(a, b, typename Vectors<Real>::Index{from...});
#endif
}

// Lane i is x[i ^ half].
template <int half, class Real, int... i>
MT_HD Vector<Real> swapped(const Vector<Real>& x, std::integer_sequence<int, i...>) {
    return shuffled<Real, (i ^ half)...>(x, x);
}

// Lane i is a[i] + a[i ^ half] where bit `half` of i is 0, else b[i] + b[i ^ half].
template <int half, class Real, int... i>
MT_HD Vector<Real> fold(const Vector<Real>& a, const Vector<Real>& b, std::integer_sequence<int, i...>) {
    return shuffled<Real, (i & half ? i + lanes<Real> : i)...>(a, b) +
           shuffled<Real, (i & half ? (i ^ half) + lanes<Real> : i ^ half)...>(a, b);
}

// Halves the number of vectors until one is left, whose lane i comes from x[i]: see sums().
template <int half, class Real>
MT_HD void fold_halves(Vector<Real>* x) {
    if constexpr (half >= 1) {
        for (int j = 0; j < half; ++j) x[j] = fold<half, Real>(x[j], x[j + half], Lanes<Real>());
        fold_halves<half / 2, Real>(x);
    }
}

// Lane i is the sum of the lanes of x whose number is i modulo `count`, a power of two.
template <int count, class Real>
MT_HD Vector<Real> fold_lanes(const Vector<Real>& x) {
    if constexpr (count < lanes<Real>) {
        return fold_lanes<2 * count, Real>(x + swapped<count, Real>(x, Lanes<Real>()));
    } else {
        return x;
    }
}

// Every lane is the largest lane of x.
template <class Real, int half = lanes<Real> / 2>
MT_HD Vector<Real> largest_lane(const Vector<Real>& x) {
    if constexpr (half >= 1) {
        const Vector<Real> y = swapped<half, Real>(x, Lanes<Real>());
        return largest_lane<Real, half / 2>(x > y ? x : y);
    } else {
        return x;
    }
}

// Lane i is the sum of all lanes of x[i], for i < count, a power of two up to the number of lanes.
template <int count, class Real>
MT_HD Vector<Real> sums(const Real* x) {
    Vector<Real> v[count];
    for (int j = 0; j < count; ++j) v[j] = load(x + j * lanes<Real>);
    fold_halves<count / 2, Real>(v);
    return fold_lanes<count, Real>(v[0]);
}

// `x` in the lanes before `count`, `padding` in the others.
template <class Real, int... i>
MT_HD Vector<Real> pad(const Vector<Real>& x, std::int64_t count, Real padding, std::integer_sequence<int, i...>) {
    const typename Vectors<Real>::Index place = {i...};
    return place < typename Vectors<Real>::Index{} + decltype(place[0] + 0)(count) ? x : Vector<Real>{} + padding;
}

// ---- rows: d values as the arithmetic wants them, 0 behind them up to `width`, a multiple of load_lanes

template <class T>
constexpr int load_lanes = lanes<T>;
template <>
constexpr int load_lanes<BFloat16> = 2 * lanes<float>;

template <class Real>
MT_HD void load_some(const Real* from, Real factor, Real* to) {
    store<Real>(load(from) * factor, to);
}

template <class Real>
MT_HD void store_some(const Real* from, Real factor, Real* to) {
    store<Real>(load(from) * factor, to);
}

// A row of BFloat16 holds, of each two vectors, the even values in the first and the odd ones in the second: to get
// them takes a shift and a mask, and no sum over d minds their order.

typedef std::uint32_t Pairs __attribute__((vector_size(vector_bytes)));

MT_HD void load_some(const BFloat16* from, float factor, float* to) {
    Pairs pairs;
    std::memcpy(&pairs, from, sizeof pairs);
    store<float>(Vector<float>(pairs << 16) * factor, to);
    store<float>(Vector<float>(pairs & 0xffff0000u) * factor, to + lanes<float>);
}

// To the nearest, ties to even, in the upper half; NaN stays NaN.
MT_HD Pairs rounded(const Vector<float>& x) {
    const Pairs bits = Pairs(x);
    return x == x ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000;
}

MT_HD void store_some(const float* from, float factor, BFloat16* to) {
    const Pairs pairs =
        rounded(load(from) * factor) >> 16 | (rounded(load(from + lanes<float>) * factor) & 0xffff0000u);
    std::memcpy(to, &pairs, sizeof pairs);
}

// A head's d values, times `factor`, become a row.
template <class T, class Real>
MT_HD void load_row(const T* from, std::int64_t d, Real factor, Real* to) {
    std::int64_t c = 0;
    for (; c + load_lanes<T> <= d; c += load_lanes<T>) load_some(from + c, factor, to + c);
    if (c < d) {
        T rest[load_lanes<T>] = {};
        for (std::int64_t i = c; i < d; ++i) rest[i - c] = from[i];
        load_some(rest, factor, to + c);
    }
}

// A row, times `factor`, becomes a head's d values.
template <class T, class Real>
MT_HD void store_row(const Real* from, std::int64_t d, Real factor, T* to) {
    std::int64_t c = 0;
    for (; c + load_lanes<T> <= d; c += load_lanes<T>) store_some(from + c, factor, to + c);
    if (c < d) {
        T rest[load_lanes<T>];
        store_some(from + c, factor, rest);
        for (std::int64_t i = c; i < d; ++i) to[i] = rest[i - c];
    }
}

template <class Real>
MT_HD void fill(Real* to, std::int64_t count, Real value) {
    for (std::int64_t i = 0; i < count; ++i) to[i] = value;
}

// A number that is known when compiling.
template <int n>
struct Known {
    constexpr operator int() const { return n; }
};

// Calls f(first, n) for groups of n vectors, n Known, that together make a row.
template <class Real, class F>
MT_HD void by_registers(std::int64_t width, F f) {
    constexpr std::int64_t one = lanes<Real>;
    std::int64_t c = 0;
    for (; c + 8 * one <= width; c += 8 * one) f(c, Known<8>());
    for (; c + 4 * one <= width; c += 4 * one) f(c, Known<4>());
    for (; c < width; c += one) f(c, Known<1>());
}

// products[j] = x . rows[j], and `padding` behind them up to whole vectors. `partial` has a vector for each.
template <class Real>
MT_HD void dot_products(const Real* x, const Real* rows, std::int64_t count, std::int64_t width, Real padding,
                        Real* partial, Real* products) {
    by_registers<Real>(width, [&](std::int64_t c, auto n) {
        Vector<Real> own[n];
        for (int i = 0; i < n; ++i) own[i] = load(x + c + i * lanes<Real>);
#pragma GCC unroll 2
        for (std::int64_t j = 0; j < count; ++j) {
            const Real* const row = rows + j * width + c;
            Vector<Real> sum = own[0] * load(row);
            for (int i = 1; i < n; ++i) sum += own[i] * load(row + i * lanes<Real>);
            Real* const to = partial + j * lanes<Real>;
            store<Real>(c ? load(to) + sum : sum, to);
        }
    });
    constexpr int half = lanes<Real> / 2;
    for (std::int64_t j = 0; j < count; j += lanes<Real>) {
        const Real* const from = partial + j * lanes<Real>;
        const Vector<Real> sum = count - j <= half ? sums<half, Real>(from) : sums<lanes<Real>, Real>(from);
        store<Real>(pad<Real>(sum, count - j, padding, Lanes<Real>()), products + j);
    }
}

// result = sum_j weights[j * step] rows[j], on top of what it was where `add`.
template <bool add, class Real>
MT_HD void weighted_sum(const Real* weights, std::int64_t step, const Real* rows, std::int64_t count,
                        std::int64_t width, Real* result) {
    by_registers<Real>(width, [&](std::int64_t c, auto n) {
        Vector<Real> sum[n];
        for (int i = 0; i < n; ++i) sum[i] = add ? load(result + c + i * lanes<Real>) : Vector<Real>{};
#pragma GCC unroll 2
        for (std::int64_t j = 0; j < count; ++j) {
            const Real weight = weights[j * step];
            const Real* const row = rows + j * width + c;
            for (int i = 0; i < n; ++i) sum[i] += load(row + i * lanes<Real>) * weight;
        }
        for (int i = 0; i < n; ++i) store<Real>(sum[i], result + c + i * lanes<Real>);
    });
}

// Scores become probabilities in place, whole vectors of them.
template <class Real>
MT_HD void softmax(Real* scores, std::int64_t count) {
    Vector<Real> largest = load(scores), sum = {};
    for (std::int64_t j = lanes<Real>; j < count; j += lanes<Real>) {
        const Vector<Real> x = load(scores + j);
        largest = largest > x ? largest : x;
    }
    largest = largest_lane<Real>(largest);
    for (std::int64_t j = 0; j < count; j += lanes<Real>) {
        Real x[lanes<Real>];
        store<Real>(load(scores + j) - largest, x);
        for (int i = 0; i < lanes<Real>; ++i) x[i] = exp_nonpositive(x[i]);
        store<Real>(load(x), scores + j);
        sum += load(x);
    }
    const Real factor = 1 / fold_lanes<1, Real>(sum)[0];
    for (std::int64_t j = 0; j < count; j += lanes<Real>) store<Real>(load(scores + j) * factor, scores + j);
}

// Gradients to probabilities become gradients to scores in place.
template <class Real>
MT_HD void softmax_backward(const Real* probabilities, Real* slopes, std::int64_t count) {
    Vector<Real> mean = {};
    for (std::int64_t j = 0; j < count; j += lanes<Real>) mean += load(probabilities + j) * load(slopes + j);
    mean = fold_lanes<1, Real>(mean);
    for (std::int64_t j = 0; j < count; j += lanes<Real>) {
        store<Real>(load(probabilities + j) * (load(slopes + j) - mean), slopes + j);
    }
}

// ---- the op

inline int this_thread() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

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
