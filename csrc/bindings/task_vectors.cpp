// Python bindings of the task-vector ops: merge_deltas and count_around.
#include "mergetune/task_vectors.h"

#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/bindings.h"
#include "checks.h"

namespace mergetune {
namespace {

// The task vectors as Python passes them: addresses (0 for none), by_count, scale and n.
using TaskArguments = std::tuple<Address, std::vector<Address>, Address, Address, Address, Address, Address, bool,
                                 double, std::int64_t>;

void merge_deltas_from_python(const std::string& dtype, const TaskArguments& arguments, Address out,
                              const std::string& variant) {
    const std::vector<Address>& experts = std::get<1>(arguments);
    const std::int64_t n = std::get<9>(arguments);
    check_at_least("K", 1, std::int64_t(experts.size()));
    check_at_least("n", 1, n);
    with_dtype<float, double, Half, BFloat16>(dtype, [&](auto value) {
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
    check_at_least("n", 1, n);
    std::array<std::int64_t, 4> counts{};
    with_dtype<float, double, Half, BFloat16>(dtype, [&](auto value) {
        using Value = decltype(value);
        const auto* const from = pointer<const Value>("values_ptr", values);
        const auto* const start = maybe<const Value>("base_ptr", base);
        auto* const to = pointer<Real<Value>>("between_ptr", between);
        py::gil_scoped_release unlocked;
        count_around_cpu(from, start, n, Real<Value>(low), Real<Value>(high), counts.data(), to, variant);
    });
    return counts;
}

}  // namespace

void bind_task_vectors(py::module_& module) {
    using namespace pybind11::literals;
    module.def("merge_deltas_cpu", &merge_deltas_from_python, "dtype"_a, "task_vectors"_a, "out_ptr"_a,
               "variant"_a = "",
               "Task vectors trimmed, elected and added: csrc/include/mergetune/task_vectors.h. task_vectors is (base or\n"
               "0, list of experts, kept or 0, limits or 0, weights, votes or 0, shares or 0, by_count, scale, n).");
    module.def("count_around_cpu", &count_around_from_python, "dtype"_a, "values_ptr"_a, "base_ptr"_a, "n"_a,
               "low"_a, "high"_a, "between_ptr"_a, "variant"_a = "",
               "How many values, or magnitudes of their differences from a base, lie below `low`, equal it, lie between,\n"
               "equal `high`; those between are copied.");
}

}  // namespace mergetune
