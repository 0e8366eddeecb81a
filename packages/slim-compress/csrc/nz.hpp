// Whole-matrix operations outside the codec.
#pragma once

#include "layout.hpp"

namespace slc1 {

// Writes grid.k1 * grid.n1 fractals, padding as zeros.
void nd_to_nz(const View& matrix, const Grid& grid, std::uint8_t* out);

// Counts of the 256 byte values of an n x k matrix.
void histogram(const View& matrix, std::size_t n, std::size_t k, std::int64_t* counts);

}  // namespace slc1
