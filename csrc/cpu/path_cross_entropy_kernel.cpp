// The CPU kernel of path_cross_entropy, compiled once for each instruction set (MT_VARIANT names it).
//
// Standard containers and algorithms are not used: the linker keeps one copy of each of their functions for all object
// files, and this copy must not be one that was compiled for AVX-512.
#include "cpu/path_cross_entropy_kernel.h"

#include "cpu/kernel_basics.h"

namespace mergetune {
namespace MT_VARIANT {
namespace {

// The padding makes logits of -inf, hence exponentials and gradients of exactly 0, with finite products.
constexpr int product_padding = -1;
template <class T>
constexpr T rscale_padding = T(INFINITY);

template <class T>
inline void copy_padded(const T* from, T* to, std::int64_t C, std::int64_t width, T padding) {
    for (std::int64_t c = 0; c < C; ++c) to[c] = from[c];
    for (std::int64_t c = C; c < width; ++c) to[c] = padding;
}

// The three passes below work on padded, aligned rows of `width` classes.

// Logits of one row at one path point; returns the largest.
template <class T>
inline T row_logits(const T* anchor, const T* tuned, const T* rscale, PathWeights<T> path, T* logits,
                    std::int64_t width) {
    T largest = -INFINITY;
#pragma omp simd reduction(max : largest) aligned(anchor, tuned, rscale, logits : cache_line)
    for (std::int64_t c = 0; c < width; ++c) {
        const T l = path(anchor[c], tuned[c]) * rscale[c];
        logits[c] = l;
        largest = largest > l ? largest : l;
    }
    return largest;
}

// Logits become exp(logit - largest) in place; returns their sum.
template <class T>
inline T row_exponentials(T* logits, T largest, std::int64_t width) {
    T sum = 0;
#pragma omp simd reduction(+ : sum) aligned(logits : cache_line)
    for (std::int64_t c = 0; c < width; ++c) {
        const T e = exp_nonpositive(logits[c] - largest);
        logits[c] = e;
        sum += e;
    }
    return sum;
}

// Adds R rows' gradients: to their own d_dots, and to the block's d_rscale.
template <class T, int R>
inline void gradients(const T* anchor, const T* tuned, const T* rscale, PathWeights<T> path, const T* exponentials,
                      const T* step, T* d_dots, T* d_rscale, std::int64_t width, std::int64_t pitch) {
#pragma omp simd aligned(anchor, tuned, rscale, exponentials, d_dots, d_rscale : cache_line)
    for (std::int64_t c = 0; c < width; ++c) {
        const T to_dots = path.tuned * rscale[c];
        T to_rscale = d_rscale[c];
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) {
            const std::int64_t at = i * pitch + c;
            const T g = step[i] * exponentials[at];
            d_dots[at] += g * to_dots;
            to_rscale += g * path(anchor[at], tuned[at]);
        }
        d_rscale[c] = to_rscale;
    }
}

// R rows from b0 on, all path points: adds to the block's loss [P] and d_rscale [P, width], writes d_dots of the rows.
template <class T, int R>
void rows(const PathCrossEntropy<T>& op, std::int64_t b0, const T* rscales, T* tile, T* block_d_rscale,
          double* block_loss) {
    const std::int64_t width = padded_classes<T>(op.C), pitch = tile_pitch<T>(op.C), plane = R * pitch;
    T* const products = tile;  // [K + 1, R, pitch]
    T* const exponentials = products + (op.K + 1) * plane;
    T* const d_dots = exponentials + plane;
    for (std::int64_t m = 0; m <= op.K; ++m) {
        for (int i = 0; i < R; ++i) {
            const T* from = op.dots + m * op.stride_m + (b0 + i) * op.stride_b;
            copy_padded(from, products + m * plane + i * pitch, op.C, width, T(product_padding));
        }
    }
    fill(d_dots, plane, T(0));

    for (std::int64_t p = 0; p < op.P; ++p) {
        const double alpha = op.anchor[p] == 0 ? 1.0 : op.alpha[p];
        const PathWeights<T> path(alpha);
        const T* const rscale = rscales + p * width;
        const T* const tuned = products;
        const T* const anchor = alpha == 1.0 ? tuned : products + op.anchor[p] * plane;

        T largest[R], sum[R], step[R];
        for (int i = 0; i < R; ++i) {
            const std::int64_t at = i * pitch;
            largest[i] = row_logits(anchor + at, tuned + at, rscale, path, exponentials + at, width);
        }
        double loss = 0, product_of_sums = 1;  // one logarithm for R rows: each sum lies in [1, C]
        for (int i = 0; i < R; ++i) {
            T& label = exponentials[i * pitch + op.labels[b0 + i]];
            loss += double(largest[i]) - double(label);
            sum[i] = row_exponentials(exponentials + i * pitch, largest[i], width);
            product_of_sums *= double(sum[i]);
            label -= sum[i];                                            // now e / sum is softmax - onehot,
            step[i] = T(op.weight[p] / (double(op.B) * double(sum[i])));  // and e * step the row's gradient
        }
        block_loss[p] += loss + std::log(product_of_sums);
        gradients<T, R>(anchor, tuned, rscale, path, exponentials, step, d_dots, block_d_rscale + p * width, width,
                        pitch);
    }

    for (int i = 0; i < R; ++i) copy_padded(d_dots + i * pitch, op.d_dots + (b0 + i) * op.C, op.C, op.C, T(0));
}

template <class T>
void run(const PathCrossEntropy<T>& op, const PathWorkspace<T>& workspace, [[maybe_unused]] int threads) {
    const RowBlocks blocks(op.B);
    const std::int64_t width = padded_classes<T>(op.C);

#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (std::int64_t p = 0; p < op.P; ++p) {
            copy_padded(op.rscale + p * op.C, workspace.rscale + p * width, op.C, width, rscale_padding<T>);
        }

        T* const tile = workspace.tiles + this_thread() * tile_size<T>(op.K, op.C);
#pragma omp for schedule(dynamic, 1)
        for (std::int64_t block = 0; block < blocks.count; ++block) {
            T* const d_rscale = workspace.d_rscale + block * op.P * width;
            double* const loss = workspace.loss + block * op.P;
            fill(d_rscale, op.P * width, T(0));
            fill(loss, op.P, 0.0);

            std::int64_t b = block * blocks.rows;
            const std::int64_t end = b + blocks.rows < op.B ? b + blocks.rows : op.B;
            if (tile_size<T>(op.K, op.C) * std::int64_t(sizeof(T)) <= tile_bytes) {
                for (; b + 4 <= end; b += 4) rows<T, 4>(op, b, workspace.rscale, tile, d_rscale, loss);
            }
            for (; b + 2 <= end; b += 2) rows<T, 2>(op, b, workspace.rscale, tile, d_rscale, loss);
            for (; b < end; ++b) rows<T, 1>(op, b, workspace.rscale, tile, d_rscale, loss);
        }

        // The blocks' partial sums, added in the order of the blocks.
#pragma omp for schedule(static)
        for (std::int64_t p = 0; p < op.P; ++p) {
            double loss = 0;
            for (std::int64_t block = 0; block < blocks.count; ++block) loss += workspace.loss[block * op.P + p];
            op.loss[p] = loss / double(op.B);

            T* const total = op.d_rscale + p * op.C;
            fill(total, op.C, T(0));
            for (std::int64_t block = 0; block < blocks.count; ++block) {
                const T* const part = workspace.d_rscale + (block * op.P + p) * width;
#pragma omp simd
                for (std::int64_t c = 0; c < op.C; ++c) total[c] += part[c];
            }
        }
    }
}

}  // namespace

void path_cross_entropy(const PathCrossEntropy<float>& op, const PathWorkspace<float>& workspace, int threads) {
    run(op, workspace, threads);
}

void path_cross_entropy(const PathCrossEntropy<double>& op, const PathWorkspace<double>& workspace, int threads) {
    run(op, workspace, threads);
}

}  // namespace MT_VARIANT
}  // namespace mergetune
