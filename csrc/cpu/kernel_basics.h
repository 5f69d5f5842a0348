// Shared parts of the CPU kernels, compiled once for each instruction set (MT_VARIANT names it).
#pragma once

#include "mergetune/row_math.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace mergetune {
namespace MT_VARIANT {
namespace {

inline int this_thread() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

template <class T>
MT_HD void fill(T* to, std::int64_t count, T value) {
    for (std::int64_t i = 0; i < count; ++i) to[i] = value;
}

}  // namespace
}  // namespace MT_VARIANT
}  // namespace mergetune
