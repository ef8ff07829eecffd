#include "capability.h"

#include <cstdlib>

namespace fusedoptim {
namespace {

std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if !defined(FUSEDOPTIM_WITHOUT_AVX512)
  if (avx2 && avx512) found.push_back(&kAvx512Kernels);
#endif
#if !defined(FUSEDOPTIM_WITHOUT_AVX2)
  if (avx2) found.push_back(&kAvx2Kernels);
#endif
#endif
  found.push_back(&kPortableKernels);
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

const Kernels& cpu_kernels() { return *current(); }

bool set_cpu_capability(const std::string& name) {
  const Kernels* k = find(name);
  if (k) current() = k;
  return k != nullptr;
}

}  // namespace fusedoptim
