// Memory of the CPU kernels' workspaces. Files that are compiled once per variant must not include this.
#pragma once

#include <memory>
#include <new>

#include "cpu/alignment.h"

namespace mergetune {

struct FreeWorkspace {
    void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(cache_line)); }
};

// Uninitialised and aligned to a cache line: the kernel writes before it reads.
template <class T>
std::unique_ptr<T, FreeWorkspace> allocate_workspace(std::int64_t count) {
    return std::unique_ptr<T, FreeWorkspace>(
        static_cast<T*>(::operator new(sizeof(T) * std::size_t(count), std::align_val_t(cache_line))));
}

}  // namespace mergetune
