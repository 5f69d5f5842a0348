// Compiler vector types as wide as the instruction set's vectors, and operations across their lanes.
#pragma once

#include <utility>  // integer_sequence, a type

#include "mergetune/row_math.h"

namespace mergetune {
namespace MT_VARIANT {
namespace {

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

}  // namespace
}  // namespace MT_VARIANT
}  // namespace mergetune
