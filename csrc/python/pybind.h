// pybind11, as torch brings it. torch 2.10 and 2.11 refuse it beside a target version, because pybind11 is not part of
// their stable interface; here it only makes a Python module and touches nothing of torch.
#pragma once

#pragma push_macro("TORCH_TARGET_VERSION")
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#pragma pop_macro("TORCH_TARGET_VERSION")
