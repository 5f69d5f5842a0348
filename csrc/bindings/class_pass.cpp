// Python bindings of the class passes: path_scales and class_gradient.
#include "mergetune/class_pass.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <tuple>

#include "bindings/arguments.h"
#include "bindings/bindings.h"
#include "checks.h"

namespace mergetune {
namespace {

// The class weights as Python passes them: addresses (0 for none), then scale, normalize and sizes.
using ClassArguments = std::tuple<Address, Address, Address, Address, Address, Address, double, bool, std::int64_t,
                                  std::int64_t, std::int64_t, std::int64_t>;

template <class T>
ClassWeights<T> class_weights(const ClassArguments& arguments) {
    const auto [w, anchors, w1, curvature, anchor, alpha, scale, normalize, K, C, D, P] = arguments;
    check_at_least("C", 1, C);
    check_at_least("D", 1, D);
    check_at_least("P", 1, P);
    const auto* const points = pointer<const std::int64_t>("anchor", anchor);
    check_range("anchor", points, P, 0, K);
    return {pointer<const T>("w", w),
            K ? pointer<const T>("anchors", anchors) : nullptr,
            maybe<const T>("w1", w1),
            maybe<const T>("curvature", curvature),
            points,
            pointer<const double>("alpha", alpha),
            scale,
            normalize,
            K,
            C,
            D,
            P};
}

void path_scales_from_python(const std::string& dtype, const ClassArguments& arguments, Address rscale,
                             Address products, int num_threads, const std::string& variant) {
    check_at_least("num_threads", 1, num_threads);
    with_dtype<float, double>(dtype, [&](auto value) {
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
    check_at_least("num_threads", 1, num_threads);
    with_dtype<float, double>(dtype, [&](auto value) {
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

}  // namespace

void bind_class_pass(py::module_& module) {
    using namespace pybind11::literals;
    module.def("path_scales_cpu", &path_scales_from_python, "dtype"_a, "class_weights"_a, "rscale_ptr"_a,
               "products_ptr"_a, "num_threads"_a, "variant"_a = "",
               "Logit scale over the norm of each interpolated class weight: csrc/include/mergetune/class_pass.h.\n"
               "class_weights is (w, anchors, w1 or 0, curvature or 0, anchor, alpha, scale, normalize, K, C, D, P).");
    module.def("class_gradient_cpu", &class_gradient_from_python, "dtype"_a, "class_weights"_a, "rscale_ptr"_a,
               "d_rscale_ptr"_a, "products_ptr"_a, "lam"_a, "grad_ptr"_a, "surrogate_ptr"_a, "num_threads"_a,
               "variant"_a = "", "Adds the gradient through the norms and of the surrogate; the surrogate's value.");
}

}  // namespace mergetune
