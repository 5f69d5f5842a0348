// The passes of lmc_loss over classes, before and after path_cross_entropy: norms on the paths, and the surrogate.
//
// Shapes: C classes, D embedding width, K anchors, P path points.
#pragma once

#include <cstdint>
#include <string>

namespace mergetune {

// The weights that paths lead between, and the points on them. Every array is contiguous.
template <class T>
struct ClassWeights {
    const T* w;                  // [C, D], what is searched
    const T* anchors;            // [K, C, D]
    const T* w1;                 // [C, D], the zero-shot weights; null leaves the surrogate out
    const T* curvature;          // [C, D]; null is the identity
    const std::int64_t* anchor;  // [P], each in [0, K]; 0 is w itself
    const double* alpha;         // [P]
    double scale;
    bool normalize;              // class weights are made unit norm, after the interpolation
    std::int64_t K, C, D, P;
};

// rscale[p,c] = scale / |t_p[c]| of the interpolated weight t_p = (1 - alpha_p) anchor + alpha_p w, or scale alone if
// not normalised. `products` [C, 1 + 2 K] keeps w.w, then for each anchor a.a and a.w, for the pass below.
//
// Both passes: the bits depend on the variant and the sizes, never on num_threads.
template <class T>
void path_scales_cpu(const ClassWeights<T>& op, T* rscale, double* products, int num_threads,
                     const std::string& variant);

// Adds to `grad` [C, D] what reaches w through rscale, and lam times the gradient of the surrogate
//
//   S = 1/2 mean_c sum_d h[c,d] (u - u1)[c,d]^2      u, u1 of unit norm if normalised
//
// whose value goes to `surrogate`.
template <class T>
void class_gradient_cpu(const ClassWeights<T>& op, const T* rscale, const T* d_rscale, const double* products,
                        double lam, T* grad, double* surrogate, int num_threads, const std::string& variant);

}  // namespace mergetune
