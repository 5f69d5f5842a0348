// The Python module mergetune._C: raw pointers in, C++ ops out. It knows nothing of torch; mergetune/ops does.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/variants.h"
#include "mergetune/class_pass.h"
#include "mergetune/path_cross_entropy.h"
#include "mergetune/prefix_attention.h"
#include "mergetune/task_vectors.h"

namespace py = pybind11;

namespace mergetune {
namespace {

using Address = std::uintptr_t;

void check_size(const char* name, std::int64_t value) {
    if (value < 1) throw std::invalid_argument(std::string(name) + " must be at least 1, got " + std::to_string(value));
}

template <class T>
T* pointer(const char* name, Address address) {
    if (!address) throw std::invalid_argument(std::string(name) + " must be the address of a tensor's data, got 0");
    if (address % alignof(T)) {
        throw std::invalid_argument(std::string(name) + " must be a multiple of " + std::to_string(alignof(T)) +
                                    ", got " + std::to_string(address));
    }
    return reinterpret_cast<T*>(address);
}

// The arguments of path_cross_entropy as Python passes them, before the element type is known.
struct PathArguments {
    Address dots;
    std::int64_t stride_m, stride_b;
    Address labels, anchor, alpha, weight, rscale, loss, d_dots, d_rscale;
    std::int64_t K, B, C, P;

    template <class T>
    PathCrossEntropy<T> typed() const {
        if (K < 0) throw std::invalid_argument("K must be at least 0, got " + std::to_string(K));
        check_size("B", B);
        check_size("C", C);
        check_size("P", P);
        return {pointer<const T>("dots_ptr", dots),
                stride_m,
                stride_b,
                pointer<const std::int64_t>("labels_ptr", labels),
                pointer<const std::int64_t>("anchor_ptr", anchor),
                pointer<const double>("alpha_ptr", alpha),
                pointer<const double>("weight_ptr", weight),
                pointer<const T>("rscale_ptr", rscale),
                pointer<double>("loss_ptr", loss),
                pointer<T>("d_dots_ptr", d_dots),
                pointer<T>("d_rscale_ptr", d_rscale),
                K,
                B,
                C,
                P};
    }
};

// Calls run(T()) for the type that `dtype` names.
template <class Run>
void with_real(const std::string& dtype, Run run) {
    if (dtype == "float32") {
        run(float());
    } else if (dtype == "float64") {
        run(double());
    } else {
        throw std::invalid_argument("dtype must be 'float32' or 'float64', got '" + dtype + "'");
    }
}

// Calls `run` with the arguments typed as `dtype` says, without the interpreter's lock.
template <class Run>
void with_dtype(const std::string& dtype, const PathArguments& arguments, Run run) {
    with_real(dtype, [&](auto value) {
        const auto op = arguments.typed<decltype(value)>();
        py::gil_scoped_release unlocked;
        run(op);
    });
}

void path_cross_entropy_from_python_cpu(const std::string& dtype, Address dots, std::int64_t stride_m,
                                        std::int64_t stride_b, Address labels, Address anchor, Address alpha,
                                        Address weight, Address rscale, Address loss, Address d_dots,
                                        Address d_rscale, std::int64_t K, std::int64_t B, std::int64_t C,
                                        std::int64_t P, int num_threads, const std::string& variant) {
    check_size("num_threads", num_threads);
    with_dtype(dtype,
               {dots, stride_m, stride_b, labels, anchor, alpha, weight, rscale, loss, d_dots, d_rscale, K, B, C, P},
               [&](const auto& op) { path_cross_entropy_cpu(op, num_threads, variant); });
}

#ifdef MERGETUNE_WITH_CUDA
void path_cross_entropy_from_python_cuda(const std::string& dtype, Address dots, std::int64_t stride_m,
                                         std::int64_t stride_b, Address labels, Address anchor, Address alpha,
                                         Address weight, Address rscale, Address loss, Address d_dots,
                                         Address d_rscale, std::int64_t K, std::int64_t B, std::int64_t C,
                                         std::int64_t P, Address stream) {
    void* const queue = reinterpret_cast<void*>(stream);  // 0 is a stream too: the default one
    with_dtype(dtype,
               {dots, stride_m, stride_b, labels, anchor, alpha, weight, rscale, loss, d_dots, d_rscale, K, B, C, P},
               [&](const auto& op) { path_cross_entropy_cuda(op, queue); });
}
#endif

// The class weights as Python passes them: addresses (0 for none), then scale, normalize and sizes.
using ClassArguments = std::tuple<Address, Address, Address, Address, Address, Address, double, bool, std::int64_t,
                                  std::int64_t, std::int64_t, std::int64_t>;

template <class T>
ClassWeights<T> class_weights(const ClassArguments& arguments) {
    const auto [w, anchors, w1, curvature, anchor, alpha, scale, normalize, K, C, D, P] = arguments;
    const auto maybe = [](const char* name, Address address) {
        return address ? pointer<const T>(name, address) : nullptr;
    };
    check_size("C", C);
    check_size("D", D);
    check_size("P", P);
    const auto* points = pointer<const std::int64_t>("anchor", anchor);
    for (std::int64_t p = 0; p < P; ++p) {
        if (points[p] < 0 || points[p] > K) {
            throw std::invalid_argument("anchor must lie in [0, " + std::to_string(K) + "], got " +
                                        std::to_string(points[p]) + " at index " + std::to_string(p));
        }
    }
    return {pointer<const T>("w", w), K ? pointer<const T>("anchors", anchors) : nullptr,
            maybe("w1", w1), maybe("curvature", curvature), points, pointer<const double>("alpha", alpha),
            scale, normalize, K, C, D, P};
}

void path_scales_from_python(const std::string& dtype, const ClassArguments& arguments, Address rscale,
                             Address products, int num_threads, const std::string& variant) {
    check_size("num_threads", num_threads);
    with_real(dtype, [&](auto value) {
        using T = decltype(value);
        const auto op = class_weights<T>(arguments);
        T* const to = pointer<T>("rscale_ptr", rscale);
        double* const keep = pointer<double>("products_ptr", products);
        py::gil_scoped_release unlocked;
        path_scales_cpu(op, to, keep, num_threads, variant);
    });
}

void class_gradient_from_python(const std::string& dtype, const ClassArguments& arguments, Address rscale,
                                Address d_rscale, Address products, double lam, Address grad, Address surrogate,
                                int num_threads, const std::string& variant) {
    check_size("num_threads", num_threads);
    with_real(dtype, [&](auto value) {
        using T = decltype(value);
        const auto op = class_weights<T>(arguments);
        const T* const scales = pointer<const T>("rscale_ptr", rscale);
        const T* const d_scales = pointer<const T>("d_rscale_ptr", d_rscale);
        const double* const kept = pointer<const double>("products_ptr", products);
        T* const to = pointer<T>("grad_ptr", grad);
        double* const value_to = pointer<double>("surrogate_ptr", surrogate);
        py::gil_scoped_release unlocked;
        class_gradient_cpu(op, scales, d_scales, kept, lam, to, value_to, num_threads, variant);
    });
}

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

// Calls run(Value()) for the type of values that `dtype` names.
template <class Run>
void with_attention_dtype(const std::string& dtype, Run run) {
    if (dtype == "float32") {
        run(float());
    } else if (dtype == "bfloat16") {
        run(BFloat16());
    } else if (dtype == "float64") {
        run(double());
    } else {
        throw std::invalid_argument("dtype must be 'float32', 'bfloat16' or 'float64', got '" + dtype + "'");
    }
}

void prefix_attention_from_python_cpu(const std::string& dtype, const HeadsArgument& q, const HeadsArgument& k,
                                      const HeadsArgument& v, const HeadsArgument& prefix_k,
                                      const HeadsArgument& prefix_v, Address offsets, const HeadsArgument& out,
                                      std::int64_t M, std::int64_t Tq, std::int64_t T, std::int64_t S, std::int64_t C,
                                      std::int64_t H, std::int64_t d, bool causal, int num_threads,
                                      const std::string& variant) {
    check_size("num_threads", num_threads);
    const AttentionArguments arguments{q, k, v, prefix_k, prefix_v, offsets, M, Tq, T, S, C, H, d, causal};
    with_attention_dtype(dtype, [&](auto value) {
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
    check_size("num_threads", num_threads);
    const AttentionArguments arguments{q, k, v, prefix_k, prefix_v, offsets, M, Tq, T, S, C, H, d, causal};
    with_attention_dtype(dtype, [&](auto value) {
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

// Calls run(Value()) for the type of a checkpoint's values that `dtype` names.
template <class Run>
void with_stored(const std::string& dtype, Run run) {
    if (dtype == "float16") {
        run(Half());
    } else if (dtype == "bfloat16") {
        run(BFloat16());
    } else {
        with_real(dtype, run);
    }
}

// The task vectors as Python passes them: addresses (0 for none), by_count, scale and n.
using TaskArguments = std::tuple<Address, std::vector<Address>, Address, Address, Address, Address, Address, bool,
                                 double, std::int64_t>;

template <class T>
T* maybe(const char* name, Address address) {
    return address ? pointer<T>(name, address) : nullptr;
}

void merge_deltas_from_python(const std::string& dtype, const TaskArguments& arguments, Address out,
                              const std::string& variant) {
    const std::vector<Address>& experts = std::get<1>(arguments);
    const std::int64_t n = std::get<9>(arguments);
    check_size("K", std::int64_t(experts.size()));
    check_size("n", n);
    with_stored(dtype, [&](auto value) {
        using Value = decltype(value);
        std::vector<const Value*> rows;
        for (const Address expert : experts) rows.push_back(pointer<const Value>("experts", expert));
        const TaskVectors<Value> op{maybe<const Value>("base", std::get<0>(arguments)),
                                    rows.data(),
                                    maybe<const std::uint8_t>("kept", std::get<2>(arguments)),
                                    maybe<const double>("limits", std::get<3>(arguments)),
                                    pointer<const double>("weights", std::get<4>(arguments)),
                                    maybe<const double>("votes", std::get<5>(arguments)),
                                    maybe<const double>("shares", std::get<6>(arguments)),
                                    std::get<7>(arguments),
                                    std::get<8>(arguments),
                                    std::int64_t(rows.size()),
                                    n};
        auto* const to = pointer<Real<Value>>("out_ptr", out);
        py::gil_scoped_release unlocked;
        merge_deltas_cpu(op, to, variant);
    });
}

std::array<std::int64_t, 4> count_around_from_python(const std::string& dtype, Address values, Address base,
                                                     std::int64_t n, double low, double high, Address between,
                                                     const std::string& variant) {
    check_size("n", n);
    std::array<std::int64_t, 4> counts{};
    with_stored(dtype, [&](auto value) {
        using Value = decltype(value);
        const auto* const from = pointer<const Value>("values_ptr", values);
        const auto* const start = maybe<const Value>("base_ptr", base);
        auto* const to = pointer<Real<Value>>("between_ptr", between);
        py::gil_scoped_release unlocked;
        count_around_cpu(from, start, n, Real<Value>(low), Real<Value>(high), counts.data(), to, variant);
    });
    return counts;
}

std::vector<std::string> words(const std::string& text) {
    std::istringstream stream(text);
    return {std::istream_iterator<std::string>(stream), {}};
}

py::dict build_info() {
    py::dict info;
    info["version"] = MERGETUNE_VERSION;
    info["compiler"] = MERGETUNE_COMPILER;
#ifdef _OPENMP
    info["openmp"] = true;
#else
    info["openmp"] = false;
#endif
    info["cpu_variants"] = cpu_variants();
    info["cpu_variant"] = cpu_variant();
    info["cuda_archs"] = words(MERGETUNE_CUDA_ARCHS);
    return info;
}

}  // namespace
}  // namespace mergetune

PYBIND11_MODULE(_C, module) {
    using namespace mergetune;
    using namespace pybind11::literals;
    module.doc() = "The compiled core of mergetune. Takes addresses, so call it through mergetune.ops.";

    module.def("build_info", &build_info,
               "What was built and what runs: version, compiler, openmp, cpu_variants (built), cpu_variant (chosen),\n"
               "cuda_archs (empty without CUDA).");
    module.def("cpu_variant_runs", &cpu_variant_runs, "variant"_a,
               "True if this CPU variant was built and this processor can run it.");

    module.def("path_cross_entropy_cpu", &path_cross_entropy_from_python_cpu, "dtype"_a, "dots_ptr"_a, "stride_m"_a,
               "stride_b"_a, "labels_ptr"_a, "anchor_ptr"_a, "alpha_ptr"_a, "weight_ptr"_a, "rscale_ptr"_a,
               "loss_ptr"_a, "d_dots_ptr"_a, "d_rscale_ptr"_a, "K"_a, "B"_a, "C"_a, "P"_a, "num_threads"_a,
               "variant"_a = "",
               "Cross-entropy at P path points and its gradient, as csrc/include/mergetune/path_cross_entropy.h says.\n"
               "Strides are in elements. The bits do not depend on num_threads.");

    module.def("path_scales_cpu", &path_scales_from_python, "dtype"_a, "class_weights"_a, "rscale_ptr"_a,
               "products_ptr"_a, "num_threads"_a, "variant"_a = "",
               "Logit scale over the norm of each interpolated class weight: csrc/include/mergetune/class_pass.h.\n"
               "class_weights is (w, anchors, w1 or 0, curvature or 0, anchor, alpha, scale, normalize, K, C, D, P).");
    module.def("class_gradient_cpu", &class_gradient_from_python, "dtype"_a, "class_weights"_a, "rscale_ptr"_a,
               "d_rscale_ptr"_a, "products_ptr"_a, "lam"_a, "grad_ptr"_a, "surrogate_ptr"_a, "num_threads"_a,
               "variant"_a = "", "Adds the gradient through the norms and of the surrogate; the surrogate's value.");

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

    module.def("merge_deltas_cpu", &merge_deltas_from_python, "dtype"_a, "task_vectors"_a, "out_ptr"_a,
               "variant"_a = "",
               "Task vectors trimmed, elected and added: csrc/include/mergetune/task_vectors.h. task_vectors is (base or\n"
               "0, list of experts, kept or 0, limits or 0, weights, votes or 0, shares or 0, by_count, scale, n).");
    module.def("count_around_cpu", &count_around_from_python, "dtype"_a, "values_ptr"_a, "base_ptr"_a, "n"_a,
               "low"_a, "high"_a, "between_ptr"_a, "variant"_a = "",
               "How many values, or magnitudes of their differences from a base, lie below `low`, equal it, lie between,\n"
               "equal `high`; those between are copied.");

#ifdef MERGETUNE_WITH_CUDA
    module.def("path_cross_entropy_cuda", &path_cross_entropy_from_python_cuda, "dtype"_a, "dots_ptr"_a, "stride_m"_a,
               "stride_b"_a, "labels_ptr"_a, "anchor_ptr"_a, "alpha_ptr"_a, "weight_ptr"_a, "rscale_ptr"_a,
               "loss_ptr"_a, "d_dots_ptr"_a, "d_rscale_ptr"_a, "K"_a, "B"_a, "C"_a, "P"_a, "stream"_a,
               "The same on the current CUDA device; every pointer is a device pointer, stream a cudaStream_t as an\n"
               "integer. A label or an anchor out of range makes its loss NaN instead of raising.");
#endif
}
