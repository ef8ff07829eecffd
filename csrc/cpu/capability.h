// Which instruction set the CPU kernels use: the best that this processor has, unless told otherwise. All give the
// same bits.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace fusedoptim {

std::vector<std::string> compiled_cpu_capabilities();
std::vector<std::string> cpu_capabilities();  // those this processor can run, best first
const Kernels& cpu_kernels();
bool set_cpu_capability(const std::string& name);  // false if there is none of that name here

}  // namespace fusedoptim
