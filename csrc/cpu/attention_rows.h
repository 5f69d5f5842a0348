// Row arithmetic of prefix_attention. A row holds d values, followed by zeros up to `width`.
//
// The width is a multiple of load_lanes.
#pragma once

#include "cpu/vectors.h"
#include "mergetune/half_types.h"

namespace mergetune {
namespace MT_VARIANT {
namespace {

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

}  // namespace
}  // namespace MT_VARIANT
}  // namespace mergetune
