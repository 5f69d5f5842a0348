// The Python module mergetune._C. Its functions take raw pointers, without torch; mergetune/ops calls them.
#include <pybind11/stl.h>

#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "cpu/variants.h"

namespace mergetune {
namespace {

std::vector<std::string> words(const std::string& text) {
    std::istringstream stream(text);
    return {std::istream_iterator<std::string>(stream), {}};
}

py::dict build_info() {
    py::dict info;
    info["version"] = MERGETUNE_VERSION;
    info["sources"] = MERGETUNE_SOURCES;
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
               "What was built and what runs: version, sources (digest), compiler, openmp, cpu_variants (built),\n"
               "cpu_variant (chosen), cuda_archs (empty without CUDA).");
    module.def("cpu_variant_runs", &cpu_variant_runs, "variant"_a,
               "True if this CPU variant was built and this processor can run it.");

    bind_path_cross_entropy(module);
    bind_class_pass(module);
    bind_prefix_attention(module);
    bind_task_vectors(module);
}
