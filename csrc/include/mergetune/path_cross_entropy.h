// The op path_cross_entropy: its arguments, its CPU entry point and its CUDA entry point.
//
// Shapes: B rows (images), C classes, K anchors, P path points.
#pragma once

#include <cstdint>
#include <string>

namespace mergetune {

// Cross-entropy along the straight paths from K anchors to w, and its gradient, from products already made.
//
//   logits of point p:  l[b,c] = ((1 - alpha_p) dots[anchor_p,b,c] + alpha_p dots[0,b,c]) * rscale[p,c]
//   loss[p]       = mean_b CE(l_p[b], labels[b])
//   d_dots[b,c]   = sum_p weight_p / B * alpha_p * rscale[p,c] * (softmax(l_p)[b,c] - onehot[b,c])
//   d_rscale[p,c] = sum_b weight_p / B * (softmax(l_p)[b,c] - onehot[b,c]) * l[b,c] / rscale[p,c]
//
// Where alpha_p is 1 the anchor's products are not read at all. Anchor 0 is w itself, whatever alpha: the endpoint.
template <class T>
struct PathCrossEntropy {
    const T* dots;                // [K + 1, B, C]: x.w, then x.anchor_k; classes adjacent
    std::int64_t stride_m;        // elements from one model's products to the next
    std::int64_t stride_b;        // elements from one row to the next
    const std::int64_t* labels;   // [B], each in [0, C)
    const std::int64_t* anchor;   // [P], each in [0, K]; 0 is w itself, for a point that is on no path
    const double* alpha;          // [P]
    const double* weight;         // [P], a point's weight in the total loss
    const T* rscale;              // [P, C], logit scale / norm of the interpolated class embedding
    double* loss;                 // [P], unweighted
    T* d_dots;                    // [B, C], gradient of sum_p weight_p loss_p to dots[0]
    T* d_rscale;                  // [P, C], gradient of the same to rscale
    std::int64_t K, B, C, P;      // K may be 0
};

// Runs on the CPU. `variant` is "" (the process's choice, see cpu/variants.h) or one of cpu_variants().
// The bits of the result depend on the variant and the sizes, never on num_threads.
// Throws std::invalid_argument for a label or an anchor out of range.
template <class T>
void path_cross_entropy_cpu(const PathCrossEntropy<T>& op, int num_threads, const std::string& variant);

// Only where CUDA was built. Enqueues on `stream` (a cudaStream_t) of the current device; every pointer is a device
// pointer. Deterministic. Takes 24 * B * P bytes of workspace from the device's stream-ordered pool; throws
// std::runtime_error if CUDA fails.
// A label or an anchor out of range cannot be refused here without a synchronisation: it makes that loss NaN.
template <class T>
void path_cross_entropy_cuda(const PathCrossEntropy<T>& op, void* stream);

}  // namespace mergetune
