// The CPU kernels of the class passes as each variant exports them.
#pragma once

#include "mergetune/class_pass.h"

namespace mergetune {

constexpr double least_squared_norm = 1e-24;  // the square of F.normalize's floor

#define MT_DECLARE_FOR(T)                                                                                          \
    void path_scales(const ClassWeights<T>&, T* rscale, double* products, int threads);                            \
    void class_gradient(const ClassWeights<T>&, const T* rscale, const T* d_rscale, const double* products,        \
                        double lam, T* grad, double* surrogates, int threads);
#define MT_DECLARE(variant)    \
    namespace variant {        \
    MT_DECLARE_FOR(float)      \
    MT_DECLARE_FOR(double)     \
    }
MT_DECLARE(portable)
MT_DECLARE(avx2)
MT_DECLARE(avx512)
#undef MT_DECLARE
#undef MT_DECLARE_FOR

}  // namespace mergetune
