// path_cross_entropy as CUDA kernels: row statistics, then both gradients, without an array of size [P, B, C].
//
// Each of the three kernels computes the logits again: this takes two products and two loads, and storing them would
// need P times the memory of the input. Sums have a fixed order and atomics are not used, so the bits never vary.
#define MT_VARIANT cuda

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "mergetune/path_cross_entropy.h"
#include "mergetune/row_math.h"

#ifndef MT_LAUNCH  // the tests run the kernels without a GPU, through a launch of their own
#define MT_LAUNCH(kernel, grid, threads, stream, ...) kernel<<<grid, threads, 0, stream>>>(__VA_ARGS__)
#endif

namespace mergetune {
namespace {

using cuda::PathWeights;
using cuda::exp_nonpositive;

constexpr int warp = 32;
constexpr int warps = 8;          // in a block, everywhere
constexpr unsigned everyone = 0xffffffffu;
constexpr unsigned grid_limit = 65535;  // blocks along y and z

template <class T>
using Args = PathCrossEntropy<T>;

// Of one row at one path point.
template <class T>
struct RowStatistics {
    T largest, sum;  // of the logits; of exp(logit - largest)
};

template <class T>
struct Workspace {
    RowStatistics<T>* statistics;  // [P, B]
    double* loss;                  // [P, B]

    Workspace(void* memory, std::int64_t B, std::int64_t P)
        : statistics(static_cast<RowStatistics<T>*>(memory)),
          loss(reinterpret_cast<double*>(static_cast<char*>(memory) + 2 * sizeof(double) * B * P)) {}
};

// What one path point reads: the anchor's products are w's own where alpha is 1, as on the CPU.
template <class T>
struct Point {
    const T *anchor, *tuned, *rscale;
    PathWeights<T> path;
    bool valid;

    __device__ Point(const Args<T>& op, std::int64_t p) : Point(op, p, op.anchor[p]) {}

    __device__ Point(const Args<T>& op, std::int64_t p, std::int64_t k)
        : anchor(op.dots),
          tuned(op.dots),
          rscale(op.rscale + p * op.C),
          path(k == 0 ? 1.0 : op.alpha[p]),
          valid(k >= 0 && k <= op.K) {
        if (valid && op.alpha[p] != 1.0) anchor += k * op.stride_m;
    }

    __device__ T dot(std::int64_t offset) const { return path(anchor[offset], tuned[offset]); }
};

template <class T>
__device__ T nan_of() {
    return T(NAN);
}

// One warp for a row at a path point: an online maximum and sum in each lane, merged at the end.
template <class T>
__global__ void row_statistics(Args<T> op, Workspace<T> out) {
    const int lane = threadIdx.x % warp;
    const std::int64_t pairs = op.P * op.B, step = std::int64_t(gridDim.x) * warps;
    for (std::int64_t pair = std::int64_t(blockIdx.x) * warps + threadIdx.x / warp; pair < pairs; pair += step) {
        const std::int64_t p = pair / op.B, b = pair % op.B;
        const Point<T> point(op, p);
        const std::int64_t row = b * op.stride_b;

        T largest = -INFINITY;
        for (std::int64_t c = lane; c < op.C; c += warp) {
            const T l = point.dot(row + c) * point.rscale[c];
            largest = largest > l ? largest : l;
        }
        for (int other = warp / 2; other; other /= 2) {
            const T l = __shfl_xor_sync(everyone, largest, other);
            largest = largest > l ? largest : l;
        }

        T sum = 0;
        for (std::int64_t c = lane; c < op.C; c += warp) {
            sum += exp_nonpositive(point.dot(row + c) * point.rscale[c] - largest);
        }
        for (int other = warp / 2; other; other /= 2) sum += __shfl_xor_sync(everyone, sum, other);

        if (lane == 0) {
            const std::int64_t label = op.labels[b];
            const bool valid = point.valid && label >= 0 && label < op.C;
            out.statistics[pair] = {largest, valid ? sum : nan_of<T>()};
            out.loss[pair] =
                valid ? log(double(sum)) + (double(largest) - double(point.dot(row + label) * point.rscale[label]))
                      : double(NAN);
        }
    }
}

// weight / B * (softmax - onehot) of one class; the same expression as in the CPU kernel.
template <class T>
__device__ T logit_gradient(const Args<T>& op, RowStatistics<T> row, T logit, bool is_label, double weight) {
    T e = exp_nonpositive(logit - row.largest);
    if (is_label) e -= row.sum;
    return e * T(weight / double(op.B) / double(row.sum));
}

// One thread for a row and a class, all path points in turn.
template <class T>
__global__ void gradient_of_dots(Args<T> op, Workspace<T> in) {
    const std::int64_t c = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (c >= op.C) return;
    for (std::int64_t b = blockIdx.y; b < op.B; b += gridDim.y) {
        const bool is_label = op.labels[b] == c;
        T total = 0;
        for (std::int64_t p = 0; p < op.P; ++p) {
            const Point<T> point(op, p);
            const T logit = point.dot(b * op.stride_b + c) * point.rscale[c];
            const T g = logit_gradient(op, in.statistics[p * op.B + b], logit, is_label, op.weight[p]);
            total += g * (point.path.tuned * point.rscale[c]);
        }
        op.d_dots[b * op.C + c] = total;
    }
}

// One block for a path point and 32 classes: each warp takes every eighth row, then the warps' sums are added in order.
template <class T>
__global__ void gradient_of_rscale(Args<T> op, Workspace<T> in) {
    const int lane = threadIdx.x % warp, part = threadIdx.x / warp;
    const std::int64_t c = std::int64_t(blockIdx.x) * warp + lane;
    __shared__ T sums[warps][warp];
    __shared__ double losses[warps * warp];
    for (std::int64_t p = blockIdx.y; p < op.P; p += gridDim.y) {
        const Point<T> point(op, p);
        T total = 0;
        if (c < op.C) {
            for (std::int64_t b = part; b < op.B; b += warps) {
                const T dot = point.dot(b * op.stride_b + c);
                const T logit = dot * point.rscale[c];
                total += dot * logit_gradient(op, in.statistics[p * op.B + b], logit, op.labels[b] == c, op.weight[p]);
            }
        }
        sums[part][lane] = total;

        double loss = 0;
        if (blockIdx.x == 0) {
            for (std::int64_t b = threadIdx.x; b < op.B; b += warps * warp) loss += in.loss[p * op.B + b];
        }
        losses[threadIdx.x] = loss;
        __syncthreads();

        if (part == 0 && c < op.C) {
            for (int other = 1; other < warps; ++other) total += sums[other][lane];
            op.d_rscale[p * op.C + c] = total;
        }
        if (blockIdx.x == 0 && threadIdx.x == 0) {
            for (int other = 1; other < warps * warp; ++other) loss += losses[other];
            op.loss[p] = loss / double(op.B);
        }
        __syncthreads();
    }
}

unsigned blocks_for(std::int64_t items, std::int64_t per_block, std::int64_t limit) {
    const std::int64_t count = (items + per_block - 1) / per_block;
    return unsigned(count < limit ? count : limit);
}

void check(cudaError_t status) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string("path_cross_entropy on CUDA: ") + cudaGetErrorString(status));
    }
}

}  // namespace

template <class T>
void path_cross_entropy_cuda(const PathCrossEntropy<T>& op, void* raw_stream) {
    const auto stream = static_cast<cudaStream_t>(raw_stream);
    void* memory = nullptr;
    check(cudaMallocAsync(&memory, 3 * sizeof(double) * std::size_t(op.B) * std::size_t(op.P), stream));
    const Workspace<T> workspace(memory, op.B, op.P);
    const int threads = warps * warp;

    const dim3 by_pair(blocks_for(op.P * op.B, warps, 1 << 20));
    MT_LAUNCH(row_statistics, by_pair, threads, stream, op, workspace);
    const dim3 by_row(blocks_for(op.C, threads, INT32_MAX), blocks_for(op.B, 1, grid_limit));
    MT_LAUNCH(gradient_of_dots, by_row, threads, stream, op, workspace);
    const dim3 by_point(blocks_for(op.C, warp, INT32_MAX), blocks_for(op.P, 1, grid_limit));
    MT_LAUNCH(gradient_of_rscale, by_point, threads, stream, op, workspace);

    const cudaError_t launched = cudaGetLastError();
    const cudaError_t freed = cudaFreeAsync(memory, stream);
    check(launched);
    check(freed);
}

template void path_cross_entropy_cuda<float>(const PathCrossEntropy<float>&, void*);
template void path_cross_entropy_cuda<double>(const PathCrossEntropy<double>&, void*);

}  // namespace mergetune
