// Declaration of the CPU kernel of path_cross_entropy in each variant, and its workspace.
#pragma once

#include "cpu/alignment.h"
#include "cpu/each_variant.h"
#include "mergetune/path_cross_entropy.h"

namespace mergetune {

constexpr std::int64_t tile_rows = 4;           // most rows that go through the passes together
constexpr std::int64_t tile_bytes = 24 << 10;  // a larger tile would push itself out of the first-level cache

// In the workspace every row of classes begins on a cache line and is whole vectors long: no loop has a remainder.
template <class T>
constexpr std::int64_t padded_classes(std::int64_t C) {
    return whole_vectors<T>(C);
}

// Elements from one row of a tile to the next: one cache line more than the row, so that rows of 2^n classes do not
// all fall into the same few sets of the cache.
template <class T>
constexpr std::int64_t tile_pitch(std::int64_t C) {
    return padded_classes<T>(C) + cache_line / std::int64_t(sizeof(T));
}

// Rows are cut into blocks by B alone, so that the order of every sum is the same for any number of threads.
struct RowBlocks {
    std::int64_t rows, count;

    explicit RowBlocks(std::int64_t B) {
        constexpr std::int64_t fewest_rows = 16, most_blocks = 64;  // each block keeps a [P, C] partial sum
        rows = (B + most_blocks - 1) / most_blocks;
        if (rows < fewest_rows) rows = fewest_rows;
        count = (B + rows - 1) / rows;
    }
};

// Uninitialised, aligned to cache lines.
template <class T>
struct PathWorkspace {
    T* rscale;    // [P, padded C], shared
    T* tiles;     // [threads, tile_size]
    T* d_rscale;  // [blocks, P, padded C]
    double* loss;  // [blocks, P]
};

// Elements of one thread's tile: K + 1 products, the exponentials and d_dots, each [tile_rows, pitch].
template <class T>
std::int64_t tile_size(std::int64_t K, std::int64_t C) {
    return (K + 3) * tile_rows * tile_pitch<T>(C);
}

#define MT_EXPORTS(T) void path_cross_entropy(const PathCrossEntropy<T>&, const PathWorkspace<T>&, int threads);
MT_DECLARE_IN_EACH_VARIANT(MT_EXPORTS(float) MT_EXPORTS(double))
#undef MT_EXPORTS

}  // namespace mergetune
