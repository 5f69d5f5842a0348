// prefix_attention on the CPU: checks of values, workspace, and the call of the chosen variant.
#include "cpu/prefix_attention_kernel.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "checks.h"
#include "cpu/variants.h"
#include "cpu/workspace.h"

namespace mergetune {
namespace {

void check_offset(std::int64_t index, const std::string& rule, bool holds, std::int64_t value) {
    if (holds) return;
    throw std::invalid_argument("offsets must ascend strictly from 0 to T: [" + std::to_string(index) + "] must be " +
                                rule + ", got " + std::to_string(value));
}

// Returns the length of the longest sequence.
template <class T>
std::int64_t check(const PrefixAttention<T>& op) {
    check_at_least("M", 1, op.M);
    check_at_least("T", 1, op.tokens);
    check_at_least("S", 0, op.S);
    check_at_least("C", 1, op.C);
    check_at_least("H", 1, op.H);
    check_at_least("d", 1, op.d);
    if (op.Tq != op.tokens && op.Tq != op.C) {
        throw std::invalid_argument("Tq must be T or C, that is " + std::to_string(op.tokens) + " or " +
                                    std::to_string(op.C) + ", got " + std::to_string(op.Tq));
    }
    check_offset(0, "0", op.offsets[0] == 0, op.offsets[0]);
    std::int64_t longest = 0;
    for (std::int64_t c = 0; c < op.C; ++c) {
        const std::int64_t begin = op.offsets[c], end = op.offsets[c + 1];
        check_offset(c + 1, "more than " + std::to_string(begin), end > begin, end);
        check_offset(c + 1, "at most T = " + std::to_string(op.tokens), end <= op.tokens, end);
        longest = std::max(longest, end - begin);
    }
    const std::int64_t end = op.offsets[op.C];
    check_offset(op.C, "T = " + std::to_string(op.tokens), end == op.tokens, end);
    return longest;
}

// Checks the arguments, makes the workspace and calls run(workspace, threads).
template <class T, class Run>
void with_workspace(const PrefixAttention<T>& op, bool backward, int num_threads, Run run) {
    using Real = typename Arithmetic<T>::type;
    const std::int64_t most_keys = op.S + check(op);

    // A team costs a few microseconds to wake; a small call is done before that.
    const std::int64_t too_small = 1 << 15;
    const std::int64_t units = op.M * SequenceBlocks(op.C).count;
    const bool small = op.M * op.tokens * op.H * op.d < too_small;
    const int threads = small ? 1 : int(std::max<std::int64_t>(1, std::min<std::int64_t>(num_threads, units)));

    const Scratch place = Scratch::of<Real>(op.d, most_keys, backward);
    const auto scratch = allocate_workspace<Real>(threads * place.size);
    const auto d_prefix = allocate_workspace<Real>(backward ? units * op.H * 2 * op.S * place.width : 0);
    run(AttentionWorkspace<Real>{scratch.get(), d_prefix.get(), most_keys}, threads);
}

}  // namespace

template <class T>
void prefix_attention_cpu(const PrefixAttention<T>& op, const Heads<T>& out, int num_threads,
                          const std::string& requested) {
    const std::string& variant = choose_cpu_variant(requested);
    with_workspace(op, false, num_threads, [&](const auto& workspace, int threads) {
        MT_CALL_VARIANT(variant, prefix_attention(op, out, workspace, threads));
    });
}

template <class T>
void prefix_attention_backward_cpu(const PrefixAttention<T>& op, const Heads<const T>& d_out,
                                   const PrefixAttentionGradients<T>& gradients, int num_threads,
                                   const std::string& requested) {
    const std::string& variant = choose_cpu_variant(requested);
    with_workspace(op, true, num_threads, [&](const auto& workspace, int threads) {
        MT_CALL_VARIANT(variant, prefix_attention_backward(op, d_out, gradients, workspace, threads));
    });
}

#define MT_INSTANTIATE(T)                                                                                         \
    template void prefix_attention_cpu<T>(const PrefixAttention<T>&, const Heads<T>&, int, const std::string&);   \
    template void prefix_attention_backward_cpu<T>(const PrefixAttention<T>&, const Heads<const T>&,              \
                                                   const PrefixAttentionGradients<T>&, int, const std::string&);
MT_INSTANTIATE(float)
MT_INSTANTIATE(double)
MT_INSTANTIATE(BFloat16)
#undef MT_INSTANTIATE

}  // namespace mergetune
