// path_cross_entropy on the CPU: checks of values, workspace, and the call of the chosen variant.
#include "cpu/path_cross_entropy_kernel.h"

#include <algorithm>
#include <string>

#include "checks.h"
#include "cpu/variants.h"
#include "cpu/workspace.h"

namespace mergetune {

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
    const auto rscale = allocate_workspace<T>(points);
    const auto tiles = allocate_workspace<T>(threads * tile_size<T>(op.K, op.C));
    const auto d_rscale = allocate_workspace<T>(blocks.count * points);
    const auto loss = allocate_workspace<double>(blocks.count * op.P);
    const PathWorkspace<T> workspace{rscale.get(), tiles.get(), d_rscale.get(), loss.get()};

    MT_CALL_VARIANT(variant, path_cross_entropy(op, workspace, threads));
}

template void path_cross_entropy_cpu<float>(const PathCrossEntropy<float>&, int, const std::string&);
template void path_cross_entropy_cpu<double>(const PathCrossEntropy<double>&, int, const std::string&);

}  // namespace mergetune
