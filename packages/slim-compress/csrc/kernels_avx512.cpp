#include "kernels_impl.hpp"

namespace slc1 {

extern const Kernels kKernels_avx512;
const Kernels kKernels_avx512 = make_kernels("avx512");

}  // namespace slc1
