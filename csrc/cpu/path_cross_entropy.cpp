// path_cross_entropy on the CPU: checks the values, makes the workspace and calls the chosen variant.
#include <algorithm>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "path_cross_entropy_kernel.h"
#include "variants.h"

namespace mergetune {
namespace {

void check_range(const char* name, const std::int64_t* values, std::int64_t count, std::int64_t low,
                 std::int64_t high) {
    for (std::int64_t i = 0; i < count; ++i) {
        if (values[i] < low || values[i] > high) {
            throw std::invalid_argument(std::string(name) + " must lie in [" + std::to_string(low) + ", " +
                                        std::to_string(high) + "], got " + std::to_string(values[i]) + " at index " +
                                        std::to_string(i));
        }
    }
}

struct Free {
    void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(cache_line)); }
};

// Uninitialised and aligned to a cache line: the kernel writes before it reads.
template <class T>
std::unique_ptr<T, Free> allocate(std::int64_t count) {
    return std::unique_ptr<T, Free>(
        static_cast<T*>(::operator new(sizeof(T) * std::size_t(count), std::align_val_t(cache_line))));
}

}  // namespace

template <class T>
void path_cross_entropy_cpu(const PathCrossEntropy<T>& op, int num_threads, const std::string& requested) {
    const std::string& variant = choose_cpu_variant(requested);
    check_range("labels", op.labels, op.B, 0, op.C - 1);
    check_range("anchor", op.anchor, op.P, 0, op.K);

    // A team costs a few microseconds to wake; a small call is done before that.
    const std::int64_t too_small = 8192;
    const int threads = op.B * op.C * op.P < too_small ? 1 : std::max(1, num_threads);

    const RowBlocks blocks(op.B);
    const std::int64_t points = op.P * padded_classes<T>(op.C);
    const auto rscale = allocate<T>(points);
    const auto tiles = allocate<T>(threads * tile_size<T>(op.K, op.C));
    const auto d_rscale = allocate<T>(blocks.count * points);
    const auto loss = allocate<double>(blocks.count * op.P);
    const PathWorkspace<T> workspace{rscale.get(), tiles.get(), d_rscale.get(), loss.get()};

#ifdef MERGETUNE_WITH_X86
    if (variant == "avx512") return avx512::path_cross_entropy(op, workspace, threads);
    if (variant == "avx2") return avx2::path_cross_entropy(op, workspace, threads);
#endif
    portable::path_cross_entropy(op, workspace, threads);
}

template void path_cross_entropy_cpu<float>(const PathCrossEntropy<float>&, int, const std::string&);
template void path_cross_entropy_cpu<double>(const PathCrossEntropy<double>&, int, const std::string&);

}  // namespace mergetune
