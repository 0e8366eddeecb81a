// Choice of the kernels that this processor can run.
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "kernels.hpp"

namespace slc1 {

extern const Kernels kKernels_scalar;
#if defined(SLC1_HAVE_X86)
extern const Kernels kKernels_avx2;
extern const Kernels kKernels_avx512;
#elif defined(SLC1_HAVE_NEON)
extern const Kernels kKernels_neon;
#endif

namespace {

std::vector<const Kernels*> find_kernels() {
  std::vector<const Kernels*> found{&kKernels_scalar};
#if defined(SLC1_HAVE_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("sse4.2") &&
      __builtin_cpu_supports("popcnt")) {
    found.push_back(&kKernels_avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
        __builtin_cpu_supports("avx512vbmi2")) {
      found.push_back(&kKernels_avx512);
    }
  }
#elif defined(SLC1_HAVE_NEON)
  found.push_back(&kKernels_neon);
#endif
  return found;
}

const Kernels* find(const std::string& name) {
  for (const Kernels* k : available_kernels()) {
    if (name == k->name) return k;
  }
  return nullptr;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> chosen{[] {
    const char* wanted = std::getenv("SLIM_COMPRESS_ISA");
    if (wanted == nullptr) return available_kernels().back();
    const Kernels* named = find(wanted);
    if (named == nullptr) {
      throw std::invalid_argument(
          std::string("SLIM_COMPRESS_ISA names no instruction set of this machine: ") + wanted);
    }
    return named;
  }()};
  return chosen;
}

}  // namespace

const std::vector<const Kernels*>& available_kernels() {
  static const std::vector<const Kernels*> found = find_kernels();
  return found;
}

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

bool use_kernels(const std::string& name) {
  const Kernels* k = find(name);
  if (k == nullptr) return false;
  current().store(k, std::memory_order_relaxed);
  return true;
}

}  // namespace slc1
