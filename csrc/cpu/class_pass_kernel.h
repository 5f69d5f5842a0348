// Declarations of the CPU kernels of the class passes in each variant.
#pragma once

#include "cpu/each_variant.h"
#include "mergetune/class_pass.h"

namespace mergetune {

constexpr double least_squared_norm = 1e-24;  // the square of F.normalize's floor

#define MT_EXPORTS(T)                                                                                       \
    void path_scales(const ClassWeights<T>&, T* rscale, double* products, int threads);                     \
    void class_gradient(const ClassWeights<T>&, const T* rscale, const T* d_rscale, const double* products, \
                        double lam, T* grad, double* surrogates, int threads);
MT_DECLARE_IN_EACH_VARIANT(MT_EXPORTS(float) MT_EXPORTS(double))
#undef MT_EXPORTS

}  // namespace mergetune
