#include "kernels_impl.hpp"

namespace slc1 {

extern const Kernels kKernels_neon;
const Kernels kKernels_neon = make_kernels("neon");

}  // namespace slc1
