// Functions that add the ops to the Python module mergetune._C.
#pragma once

#include <pybind11/pybind11.h>

namespace mergetune {

namespace py = pybind11;

void bind_path_cross_entropy(py::module_& module);
void bind_class_pass(py::module_& module);
void bind_prefix_attention(py::module_& module);
void bind_task_vectors(py::module_& module);

}  // namespace mergetune
