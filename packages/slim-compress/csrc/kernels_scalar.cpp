#include "kernels_impl.hpp"

namespace slc1 {

extern const Kernels kKernels_scalar;
const Kernels kKernels_scalar = make_kernels("scalar");

}  // namespace slc1
