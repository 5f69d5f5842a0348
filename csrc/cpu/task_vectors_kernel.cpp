// The CPU kernels of merge_deltas and count_around, compiled once for each instruction set (MT_VARIANT names it).
//
// Elements are independent, and each is computed over the experts in their order, so the bits depend only on the
// variant. The kernels use one thread: callers use one thread per stretch. Standard containers are not used;
// path_cross_entropy_kernel.cpp says why.
#include "cpu/task_vectors_kernel.h"

#include <cmath>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace mergetune {
namespace MT_VARIANT {
namespace {

constexpr std::int64_t block = 512;  // elements that stay in the first-level cache

inline float float_of_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float widen(BFloat16 value) { return float_of_bits(std::uint32_t(value.bits) << 16); }

// The exponent is moved by a product, which also makes the small numbers normal; infinity and NaN keep all its bits.
inline float widen(Half value) {
    const std::uint32_t magnitude = std::uint32_t(value.bits & 0x7fff) << 13, sign = std::uint32_t(value.bits & 0x8000) << 16;
    std::uint32_t bits;
    const float scaled = float_of_bits(magnitude) * 0x1p112f;
    std::memcpy(&bits, &scaled, sizeof bits);
    return float_of_bits(sign | ((value.bits & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : bits));
}

// Up to a block of values as floats: in `room`, or where they are if they are floats already.
inline const float* widened(const float* from, std::int64_t, float*) { return from; }
inline const double* widened(const double* from, std::int64_t, double*) { return from; }
inline const float* widened(const BFloat16* from, std::int64_t size, float* room) {
#pragma omp simd
    for (std::int64_t i = 0; i < size; ++i) room[i] = widen(from[i]);
    return room;
}
inline const float* widened(const Half* from, std::int64_t size, float* room) {
    std::int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= size; i += 16) {
        const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
        _mm512_storeu_ps(room + i, _mm512_maskz_cvtph_ps(0xffff, halves));  // gcc 12 warns of the one without a mask
    }
#elif defined(__F16C__)
    for (; i + 8 <= size; i += 8) {
        _mm256_storeu_ps(room + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    }
#endif
    for (; i < size; ++i) room[i] = widen(from[i]);
    return room;
}

// Comparisons are written so that NaN is kept and agrees with every sign: it must reach the result.
template <bool masked, class T>
inline void trim(const T* expert, const T* base, const std::uint8_t* kept, T limit, T* delta, std::int64_t size) {
#pragma omp simd
    for (std::int64_t i = 0; i < size; ++i) {
        const T apart = base ? expert[i] - base[i] : expert[i];
        const T trimmed = std::fabs(apart) < limit ? T(0) : apart;
        delta[i] = !masked || kept[i] ? trimmed : T(0);
    }
}

template <class Value, class T>
inline void read_deltas(const TaskVectors<Value>& op, std::int64_t k, std::int64_t begin, std::int64_t size,
                        const T* base, T* delta) {
    alignas(64) T room[block];
    const T* const expert = widened(op.experts[k] + begin, size, room);
    const T limit = op.limits ? T(op.limits[k]) : T(0);
    if (op.kept) return trim<true>(expert, base, op.kept + k * op.n + begin, limit, delta, size);
    trim<false>(expert, base, nullptr, limit, delta, size);
}

template <class T>
inline void add(T* sum, T by, const T* delta, std::int64_t size) {
#pragma omp simd
    for (std::int64_t i = 0; i < size; ++i) sum[i] += by * delta[i];
}

template <class T>
inline void add_sign(T* sum, T by, const T* delta, std::int64_t size) {
#pragma omp simd
    for (std::int64_t i = 0; i < size; ++i) sum[i] += delta[i] > 0 ? by : delta[i] < 0 ? -by : T(0);
}

// Adds the deltas of the elected sign, and their shares.
template <class T>
inline void add_agreeing(T* sum, T* divisor, T by, T share, const T* votes, const T* delta, std::int64_t size) {
#pragma omp simd
    for (std::int64_t i = 0; i < size; ++i) {
        const T along = votes[i] >= 0 ? delta[i] : -delta[i];
        const bool against = along <= 0;
        sum[i] += against ? T(0) : by * delta[i];
        divisor[i] += against ? T(0) : share;
    }
}

constexpr std::int64_t few_experts = 8;  // a block of the deltas of so many stays in the first-level cache too

template <class Value, class T = Real<Value>>
void run_merge(const TaskVectors<Value>& op, T* out) {
    alignas(64) T base_room[block], votes[block], sum[block], divisor[block], deltas[few_experts][block];
    const bool kept = op.K <= few_experts;  // else they are made once for the votes and once for the sum
    for (std::int64_t begin = 0; begin < op.n; begin += block) {
        const std::int64_t size = op.n - begin < block ? op.n - begin : block;
        const T* const base = op.base ? widened(op.base + begin, size, base_room) : nullptr;
        for (std::int64_t i = 0; i < size; ++i) sum[i] = T(0);
        for (std::int64_t i = 0; op.votes && i < size; ++i) votes[i] = divisor[i] = T(0);
        for (std::int64_t k = 0; op.votes && k < op.K; ++k) {
            T* const delta = deltas[kept ? k : 0];
            read_deltas(op, k, begin, size, base, delta);
            (op.by_count ? add_sign<T> : add<T>)(votes, T(op.votes[k]), delta, size);
        }
        for (std::int64_t k = 0; k < op.K; ++k) {
            T* const delta = deltas[kept ? k : 0];
            if (!op.votes || !kept) read_deltas(op, k, begin, size, base, delta);
            if (op.votes) {
                const T share = op.shares ? T(op.shares[k]) : T(0);
                add_agreeing(sum, divisor, T(op.weights[k]), share, votes, delta, size);
            } else {
                add(sum, T(op.weights[k]), delta, size);
            }
        }
        if (op.votes && op.shares) {
#pragma omp simd
            for (std::int64_t i = 0; i < size; ++i) sum[i] /= divisor[i] != 0 ? divisor[i] : T(1);
        }
        const T scale = T(op.scale);
#pragma omp simd
        for (std::int64_t i = 0; i < size; ++i) out[begin + i] = base ? base[i] + scale * sum[i] : scale * sum[i];
    }
}

constexpr std::int64_t lanes = 16;  // values whose comparisons are the bits of one number

// A bit for each of 16 values: whether it is less than x, or equal to it.
#if defined(__AVX512F__)
template <int comparison>
inline unsigned bits(const float* values, float x) {
    return _mm512_cmp_ps_mask(_mm512_loadu_ps(values), _mm512_set1_ps(x), comparison);
}
template <int comparison>
inline unsigned bits(const double* values, double x) {
    const __m512d all = _mm512_set1_pd(x);
    return _mm512_cmp_pd_mask(_mm512_loadu_pd(values), all, comparison) |
           unsigned(_mm512_cmp_pd_mask(_mm512_loadu_pd(values + 8), all, comparison)) << 8;
}
#elif defined(__AVX2__)
template <int comparison>
inline unsigned bits(const float* values, float x) {
    unsigned found = 0;
    for (int i = 0; i < 16; i += 8) {
        found |= unsigned(_mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(values + i), _mm256_set1_ps(x), comparison)))
                 << i;
    }
    return found;
}
template <int comparison>
inline unsigned bits(const double* values, double x) {
    unsigned found = 0;
    for (int i = 0; i < 16; i += 4) {
        found |= unsigned(_mm256_movemask_pd(_mm256_cmp_pd(_mm256_loadu_pd(values + i), _mm256_set1_pd(x), comparison)))
                 << i;
    }
    return found;
}
#endif
#if defined(__AVX2__)
template <class T>
inline unsigned less(const T* values, T x) {
    return bits<_CMP_LT_OQ>(values, x);
}
template <class T>
inline unsigned equal(const T* values, T x) {
    return bits<_CMP_EQ_OQ>(values, x);
}
#else
template <class T>
inline unsigned less(const T* values, T x) {
    unsigned found = 0;
    for (int i = 0; i < int(lanes); ++i) found |= unsigned(values[i] < x) << i;
    return found;
}
template <class T>
inline unsigned equal(const T* values, T x) {
    unsigned found = 0;
    for (int i = 0; i < int(lanes); ++i) found |= unsigned(values[i] == x) << i;
    return found;
}
#endif

// Adds to the counts, and moves to `between` behind what is there.
template <class T>
void count_block(const T* values, std::int64_t size, T low, T high, std::int64_t counts[4], T* between) {
    std::int64_t below = 0, at_low = 0, inside = counts[2], at_high = 0, begin = 0;
    for (; begin + lanes <= size; begin += lanes) {
        const T* const from = values + begin;
        const unsigned under = less(from, low), at = equal(from, low);
        below += __builtin_popcount(under);
        at_low += __builtin_popcount(at);
        at_high += __builtin_popcount(equal(from, high));
        for (unsigned left = less(from, high) & ~(under | at); left; left &= left - 1) {  // few, as a rule
            between[inside++] = from[__builtin_ctz(left)];
        }
    }
    for (; begin < size; ++begin) {
        const T value = values[begin];
        below += value < low;
        at_low += value == low;
        at_high += value == high;
        if (value > low && value < high) between[inside++] = value;
    }
    counts[0] += below;
    counts[1] += at_low;
    counts[2] = inside;
    counts[3] += low == high ? 0 : at_high;
}

template <class Value, class T = Real<Value>>
void run_count(const Value* values, const Value* base, std::int64_t n, T low, T high, std::int64_t counts[4],
               T* between) {
    alignas(64) T room[block], base_room[block], magnitudes[block];
    for (int i = 0; i < 4; ++i) counts[i] = 0;
    for (std::int64_t begin = 0; begin < n; begin += block) {
        const std::int64_t size = n - begin < block ? n - begin : block;
        const T* found = widened(values + begin, size, room);
        if (base) {
            const T* const start = widened(base + begin, size, base_room);
#pragma omp simd
            for (std::int64_t i = 0; i < size; ++i) magnitudes[i] = std::fabs(found[i] - start[i]);
            found = magnitudes;
        }
        count_block(found, size, low, high, counts, between);
    }
}

}  // namespace

#define MT_DEFINE(Value)                                                                                              \
    void merge_deltas(const TaskVectors<Value>& op, Real<Value>* out) { run_merge(op, out); }                         \
    void count_around(const Value* values, const Value* base, std::int64_t n, Real<Value> low, Real<Value> high,      \
                      std::int64_t counts[4], Real<Value>* between) {                                                 \
        run_count(values, base, n, low, high, counts, between);                                                       \
    }
MT_DEFINE(float)
MT_DEFINE(double)
MT_DEFINE(Half)
MT_DEFINE(BFloat16)
#undef MT_DEFINE

}  // namespace MT_VARIANT
}  // namespace mergetune
