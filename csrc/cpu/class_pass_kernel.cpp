// The CPU kernels of the class passes, compiled once for each instruction set (MT_VARIANT names it).
//
// A class is a row, and rows are independent: threads work on different rows, and every sum stays within a row.
// Standard containers are not used; path_cross_entropy_kernel.cpp says why.
#include "cpu/class_pass_kernel.h"

#include <cmath>

namespace mergetune {
namespace MT_VARIANT {
namespace {

// Sums in double: 1 - cos and |t|^2 are small differences of large numbers near the ends of a path.
template <class T>
inline double dot(const T* a, const T* b, std::int64_t D) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t d = 0; d < D; ++d) sum += double(a[d]) * double(b[d]);
    return sum;
}

// |(1 - alpha) a + alpha w|^2 from the three products.
inline double squared_norm(double alpha, double aa, double aw, double ww) {
    return (1 - alpha) * (1 - alpha) * aa + 2 * alpha * (1 - alpha) * aw + alpha * alpha * ww;
}

template <class T>
void run_scales(const ClassWeights<T>& op, T* rscale, double* products, [[maybe_unused]] int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (std::int64_t c = 0; c < op.C; ++c) {
        double* const own = products + c * (1 + 2 * op.K);
        if (!op.normalize) {
            for (std::int64_t p = 0; p < op.P; ++p) rscale[p * op.C + c] = T(op.scale);
            continue;
        }
        const T* const w = op.w + c * op.D;
        own[0] = dot(w, w, op.D);
        for (std::int64_t k = 0; k < op.K; ++k) {
            const T* const a = op.anchors + (k * op.C + c) * op.D;
            own[1 + 2 * k] = dot(a, a, op.D);
            own[2 + 2 * k] = dot(a, w, op.D);
        }
        for (std::int64_t p = 0; p < op.P; ++p) {
            const std::int64_t k = op.anchor[p];
            const double square = k ? squared_norm(op.alpha[p], own[2 * k - 1], own[2 * k], own[0]) : own[0];
            rscale[p * op.C + c] = T(op.scale / std::sqrt(square > least_squared_norm ? square : least_squared_norm));
        }
    }
}

// grad += by * row
template <class T>
inline void add(T* grad, double by, const T* row, std::int64_t D) {
    const T factor = T(by);
#pragma omp simd
    for (std::int64_t d = 0; d < D; ++d) grad[d] += factor * row[d];
}

// What reaches w through the norms: d rscale / d w = -rscale / |t|^2 * (alpha (1 - alpha) a + alpha^2 w).
template <class T>
inline void through_norms(const ClassWeights<T>& op, std::int64_t c, const T* rscale, const T* d_rscale,
                          const double* own, T* grad) {
    double to_w = 0;
    for (std::int64_t k = 0; k <= op.K; ++k) {
        double to_anchor = 0;
        for (std::int64_t p = 0; p < op.P; ++p) {
            if (op.anchor[p] != k) continue;
            const double alpha = k ? op.alpha[p] : 1.0;
            const double square = k ? squared_norm(alpha, own[2 * k - 1], own[2 * k], own[0]) : own[0];
            if (!(square > least_squared_norm)) continue;  // a constant there
            const double pull = -double(d_rscale[p * op.C + c]) * double(rscale[p * op.C + c]) / square;
            to_w += pull * alpha * alpha;
            to_anchor += pull * alpha * (1 - alpha);
        }
        if (k) add(grad, to_anchor, op.anchors + ((k - 1) * op.C + c) * op.D, op.D);
    }
    add(grad, to_w, op.w + c * op.D, op.D);
}

// One class's surrogate, without the mean; adds `by` times its gradient.
template <class T, bool curved>
inline double surrogate_row(const T* w, const T* w1, const T* h, bool normalize, double by, T* grad, std::int64_t D) {
    double length = 1, length_1 = 1;
    if (normalize) {
        const double floor = std::sqrt(least_squared_norm);
        length = std::sqrt(dot(w, w, D));
        length_1 = std::sqrt(dot(w1, w1, D));
        length = length > floor ? length : floor;
        length_1 = length_1 > floor ? length_1 : floor;
    }
    const T inverse = T(1 / length), inverse_1 = T(1 / length_1);
    double value = 0, along = 0;  // u.slope: what only lengthens w
#pragma omp simd reduction(+ : value, along)
    for (std::int64_t d = 0; d < D; ++d) {
        const T unit = w[d] * inverse, apart = unit - w1[d] * inverse_1;
        const T slope = curved ? h[d] * apart : apart;
        value += double(slope) * double(apart);
        along += double(slope) * double(unit);
    }
    const T factor = T(by / length), projection = normalize ? T(along) : T(0);
#pragma omp simd
    for (std::int64_t d = 0; d < D; ++d) {
        const T unit = w[d] * inverse, apart = unit - w1[d] * inverse_1;
        const T slope = curved ? h[d] * apart : apart;
        grad[d] += factor * (slope - unit * projection);
    }
    return 0.5 * value;
}

template <class T>
void run_gradient(const ClassWeights<T>& op, const T* rscale, const T* d_rscale, const double* products, double lam,
                  T* grad, double* surrogates, [[maybe_unused]] int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (std::int64_t c = 0; c < op.C; ++c) {
        T* const row = grad + c * op.D;
        if (op.normalize) through_norms(op, c, rscale, d_rscale, products + c * (1 + 2 * op.K), row);
        if (!op.w1) continue;
        const T *const w = op.w + c * op.D, *const w1 = op.w1 + c * op.D;
        const double by = lam / double(op.C);
        surrogates[c] = op.curvature ? surrogate_row<T, true>(w, w1, op.curvature + c * op.D, op.normalize, by, row, op.D)
                                     : surrogate_row<T, false>(w, w1, nullptr, op.normalize, by, row, op.D);
    }
}

}  // namespace

#define MT_DEFINE(T)                                                                                                 \
    void path_scales(const ClassWeights<T>& op, T* rscale, double* products, int threads) {                          \
        run_scales(op, rscale, products, threads);                                                                   \
    }                                                                                                                \
    void class_gradient(const ClassWeights<T>& op, const T* rscale, const T* d_rscale, const double* products,       \
                        double lam, T* grad, double* surrogates, int threads) {                                      \
        run_gradient(op, rscale, d_rscale, products, lam, grad, surrogates, threads);                                \
    }
MT_DEFINE(float)
MT_DEFINE(double)
#undef MT_DEFINE

}  // namespace MT_VARIANT
}  // namespace mergetune
