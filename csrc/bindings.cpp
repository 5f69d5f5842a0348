// The Python module mergetune._C: raw pointers in, C++ ops out. It knows nothing of torch; mergetune/ops.py does.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/variants.h"
#include "mergetune/path_cross_entropy.h"

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

// Calls `run` with the arguments typed as `dtype` says, without the interpreter's lock.
template <class Run>
void with_dtype(const std::string& dtype, const PathArguments& arguments, Run run) {
    if (dtype == "float32") {
        const auto op = arguments.typed<float>();
        py::gil_scoped_release unlocked;
        run(op);
    } else if (dtype == "float64") {
        const auto op = arguments.typed<double>();
        py::gil_scoped_release unlocked;
        run(op);
    } else {
        throw std::invalid_argument("dtype must be 'float32' or 'float64', got '" + dtype + "'");
    }
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
               "Cross-entropy at P path points and its gradient; csrc/include/mergetune/path_cross_entropy.h defines it.\n"
               "Strides are in elements. The bits do not depend on num_threads.");
#ifdef MERGETUNE_WITH_CUDA
    module.def("path_cross_entropy_cuda", &path_cross_entropy_from_python_cuda, "dtype"_a, "dots_ptr"_a, "stride_m"_a,
               "stride_b"_a, "labels_ptr"_a, "anchor_ptr"_a, "alpha_ptr"_a, "weight_ptr"_a, "rscale_ptr"_a,
               "loss_ptr"_a, "d_dots_ptr"_a, "d_rscale_ptr"_a, "K"_a, "B"_a, "C"_a, "P"_a, "stream"_a,
               "The same on the current CUDA device; every pointer is a device pointer, stream a cudaStream_t as an\n"
               "integer. A label or an anchor out of range makes its loss NaN instead of raising.");
#endif
}
