// oneCCL, found at run time: see ccl.cpp.
#pragma once

#include <nanobind/nanobind.h>

namespace knltrain {

// Adds the classes and functions of the submodule `ccl`.
void bind_ccl(nanobind::module_ &m);

}  // namespace knltrain
