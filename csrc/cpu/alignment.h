// Alignment of the CPU kernels' workspaces: to cache lines, and in whole vectors.
#pragma once

#include <cstdint>

namespace mergetune {

constexpr std::int64_t cache_line = 64;  // bytes, and the widest vector of any variant

// `count` values rounded up to whole vectors.
template <class T>
__attribute__((always_inline)) constexpr std::int64_t whole_vectors(std::int64_t count) {
    constexpr std::int64_t lanes = cache_line / sizeof(T);
    return (count + lanes - 1) / lanes * lanes;
}

}  // namespace mergetune
