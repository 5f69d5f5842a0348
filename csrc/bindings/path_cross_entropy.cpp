// Python bindings of path_cross_entropy: for the CPU, and for a GPU if the core was built with CUDA.
#include "mergetune/path_cross_entropy.h"

#include <cstdint>
#include <string>

#include "bindings/arguments.h"
#include "bindings/bindings.h"
#include "checks.h"

namespace mergetune {
namespace {

// The arguments of path_cross_entropy as Python passes them, before the element type is known.
struct PathArguments {
    Address dots;
    std::int64_t stride_m, stride_b;
    Address labels, anchor, alpha, weight, rscale, loss, d_dots, d_rscale;
    std::int64_t K, B, C, P;

    template <class T>
    PathCrossEntropy<T> typed() const {
        check_at_least("K", 0, K);
        check_at_least("B", 1, B);
        check_at_least("C", 1, C);
        check_at_least("P", 1, P);
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

// Calls `run` with the arguments typed as `dtype` says, without the interpreter's lock.
template <class Run>
void with_op(const std::string& dtype, const PathArguments& arguments, Run run) {
    with_dtype<float, double>(dtype, [&](auto value) {
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
    check_at_least("num_threads", 1, num_threads);
    with_op(dtype,
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
    with_op(dtype,
            {dots, stride_m, stride_b, labels, anchor, alpha, weight, rscale, loss, d_dots, d_rscale, K, B, C, P},
            [&](const auto& op) { path_cross_entropy_cuda(op, queue); });
}
#endif

}  // namespace

void bind_path_cross_entropy(py::module_& module) {
    using namespace pybind11::literals;
    module.def("path_cross_entropy_cpu", &path_cross_entropy_from_python_cpu, "dtype"_a, "dots_ptr"_a, "stride_m"_a,
               "stride_b"_a, "labels_ptr"_a, "anchor_ptr"_a, "alpha_ptr"_a, "weight_ptr"_a, "rscale_ptr"_a,
               "loss_ptr"_a, "d_dots_ptr"_a, "d_rscale_ptr"_a, "K"_a, "B"_a, "C"_a, "P"_a, "num_threads"_a,
               "variant"_a = "",
               "Cross-entropy at P path points and its gradient, as csrc/include/mergetune/path_cross_entropy.h says.\n"
               "Strides are in elements. The bits do not depend on num_threads.");

#ifdef MERGETUNE_WITH_CUDA
    module.def("path_cross_entropy_cuda", &path_cross_entropy_from_python_cuda, "dtype"_a, "dots_ptr"_a, "stride_m"_a,
               "stride_b"_a, "labels_ptr"_a, "anchor_ptr"_a, "alpha_ptr"_a, "weight_ptr"_a, "rscale_ptr"_a,
               "loss_ptr"_a, "d_dots_ptr"_a, "d_rscale_ptr"_a, "K"_a, "B"_a, "C"_a, "P"_a, "stream"_a,
               "The same on the current CUDA device; every pointer is a device pointer, stream a cudaStream_t as an\n"
               "integer. A label or an anchor out of range makes its loss NaN instead of raising.");
#endif
}

}  // namespace mergetune
