#include "kernels_impl.hpp"

namespace slc1 {

extern const Kernels kKernels_avx2;
const Kernels kKernels_avx2 = make_kernels("avx2");

}  // namespace slc1
