// Python bindings of prefix_attention, forward and backward.
#include "mergetune/prefix_attention.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <tuple>

#include "bindings/arguments.h"
#include "bindings/bindings.h"
#include "checks.h"

namespace mergetune {
namespace {

// A tensor [M, rows, H, d] as Python passes it: its address, and its strides but the last, which is 1.
using HeadsArgument = std::tuple<Address, std::int64_t, std::int64_t, std::int64_t>;

template <class T>
Heads<T> heads(const char* name, const HeadsArgument& argument, std::int64_t rows) {
    const auto [address, stride_m, stride_row, stride_h] = argument;
    if (!rows) return {nullptr, 0, 0, 0};  // an empty tensor has no address
    return {pointer<T>(name, address), stride_m, stride_row, stride_h};
}

// The arguments of prefix_attention as Python passes them, before the element type is known.
struct AttentionArguments {
    HeadsArgument q, k, v, prefix_k, prefix_v;
    Address offsets;
    std::int64_t M, Tq, T, S, C, H, d;
    bool causal;

    template <class Value>
    PrefixAttention<Value> typed() const {
        return {heads<const Value>("q", q, Tq),
                heads<const Value>("k", k, T),
                heads<const Value>("v", v, T),
                heads<const Value>("prefix_k", prefix_k, S),
                heads<const Value>("prefix_v", prefix_v, S),
                pointer<const std::int64_t>("offsets_ptr", offsets),
                M,
                Tq,
                T,
                S,
                C,
                H,
                d,
                causal};
    }
};

void prefix_attention_from_python_cpu(const std::string& dtype, const HeadsArgument& q, const HeadsArgument& k,
                                      const HeadsArgument& v, const HeadsArgument& prefix_k,
                                      const HeadsArgument& prefix_v, Address offsets, const HeadsArgument& out,
                                      std::int64_t M, std::int64_t Tq, std::int64_t T, std::int64_t S, std::int64_t C,
                                      std::int64_t H, std::int64_t d, bool causal, int num_threads,
                                      const std::string& variant) {
    check_at_least("num_threads", 1, num_threads);
    const AttentionArguments arguments{q, k, v, prefix_k, prefix_v, offsets, M, Tq, T, S, C, H, d, causal};
    with_dtype<float, BFloat16, double>(dtype, [&](auto value) {
        using Value = decltype(value);
        const auto op = arguments.typed<Value>();
        const auto to = heads<Value>("out", out, Tq);
        py::gil_scoped_release unlocked;
        prefix_attention_cpu(op, to, num_threads, variant);
    });
}

void prefix_attention_backward_from_python_cpu(
    const std::string& dtype, const HeadsArgument& q, const HeadsArgument& k, const HeadsArgument& v,
    const HeadsArgument& prefix_k, const HeadsArgument& prefix_v, Address offsets, const HeadsArgument& d_out,
    const HeadsArgument& dq, const HeadsArgument& dk, const HeadsArgument& dv, const HeadsArgument& d_prefix_k,
    const HeadsArgument& d_prefix_v, std::int64_t M, std::int64_t Tq, std::int64_t T, std::int64_t S, std::int64_t C,
    std::int64_t H, std::int64_t d, bool causal, int num_threads, const std::string& variant) {
    check_at_least("num_threads", 1, num_threads);
    const AttentionArguments arguments{q, k, v, prefix_k, prefix_v, offsets, M, Tq, T, S, C, H, d, causal};
    with_dtype<float, BFloat16, double>(dtype, [&](auto value) {
        using Value = decltype(value);
        const auto op = arguments.typed<Value>();
        const auto from = heads<const Value>("d_out", d_out, Tq);
        const PrefixAttentionGradients<Value> gradients{
            heads<Value>("dq", dq, Tq), heads<Value>("dk", dk, T), heads<Value>("dv", dv, T),
            heads<Value>("d_prefix_k", d_prefix_k, S), heads<Value>("d_prefix_v", d_prefix_v, S)};
        py::gil_scoped_release unlocked;
        prefix_attention_backward_cpu(op, from, gradients, num_threads, variant);
    });
}

}  // namespace

void bind_prefix_attention(py::module_& module) {
    using namespace pybind11::literals;
    module.def("prefix_attention_cpu", &prefix_attention_from_python_cpu, "dtype"_a, "q"_a, "k"_a, "v"_a, "prefix_k"_a,
               "prefix_v"_a, "offsets_ptr"_a, "out"_a, "M"_a, "Tq"_a, "T"_a, "S"_a, "C"_a, "H"_a, "d"_a, "causal"_a,
               "num_threads"_a, "variant"_a = "",
               "Attention of packed sequences behind a shared prefix: see csrc/include/mergetune/prefix_attention.h.\n"
               "A tensor is (address, stride of M, of rows, of H), strides in elements. The bits do not depend on\n"
               "num_threads.");
    module.def("prefix_attention_backward_cpu", &prefix_attention_backward_from_python_cpu, "dtype"_a, "q"_a, "k"_a,
               "v"_a, "prefix_k"_a, "prefix_v"_a, "offsets_ptr"_a, "d_out"_a, "dq"_a, "dk"_a, "dv"_a, "d_prefix_k"_a,
               "d_prefix_v"_a, "M"_a, "Tq"_a, "T"_a, "S"_a, "C"_a, "H"_a, "d"_a, "causal"_a, "num_threads"_a,
               "variant"_a = "", "Its gradients from that of `out`; the probabilities are computed again.");
}

}  // namespace mergetune
