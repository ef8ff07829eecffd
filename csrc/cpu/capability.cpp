#include "capability.h"

#include <cstdlib>

namespace fusedoptim {
namespace {

// The best first, and whether this processor can run them.
std::vector<std::pair<const Kernels*, bool>> compiled() {
  std::vector<std::pair<const Kernels*, bool>> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if !defined(FUSEDOPTIM_WITHOUT_AVX512)
  found.push_back({&kAvx512Kernels, avx512});
#endif
#if !defined(FUSEDOPTIM_WITHOUT_AVX2)
  found.push_back({&kAvx2Kernels, avx2});
#endif
#endif
  found.push_back({&kPortableKernels, true});
  return found;
}

std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> found;
  for (const auto& [kernels, runs] : compiled())
    if (runs) found.push_back(kernels);
  return found;
}

const Kernels* find(const std::string& name) {
  for (const Kernels* k : runnable())
    if (name == k->name) return k;
  return nullptr;
}

const Kernels* initial() {
  const char* wanted = std::getenv("FUSEDOPTIM_CPU_CAPABILITY");
  const Kernels* k = wanted ? find(wanted) : nullptr;
  return k ? k : runnable().front();
}

const Kernels*& current() {
  static const Kernels* kernels = initial();
  return kernels;
}

}  // namespace

std::vector<std::string> cpu_capabilities() {
  std::vector<std::string> names;
  for (const Kernels* k : runnable()) names.push_back(k->name);
  return names;
}

std::vector<std::string> compiled_cpu_capabilities() {
  std::vector<std::string> names;
  for (const auto& [kernels, runs] : compiled()) names.push_back(kernels->name);
  return names;
}

const Kernels& cpu_kernels() { return *current(); }

bool set_cpu_capability(const std::string& name) {
  const Kernels* k = find(name);
  if (k) current() = k;
  return k != nullptr;
}

}  // namespace fusedoptim
