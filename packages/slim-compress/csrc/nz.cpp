#include "nz.hpp"

#include "kernels.hpp"

namespace slc1 {

void nd_to_nz(const View& m, const Grid& grid, std::uint8_t* out) {
  if (grid.n % kFractalRows != 0 || grid.k % kFractalCols != 0) {
    std::memset(out, 0, grid.n1 * grid.k1 * kFractalBytes);
  }
  // Rows of one fractal row together: each 512-byte fractal is then written in one go.
  for (std::size_t i1 = 0; i1 < grid.n1; ++i1) {
    const std::size_t rows = std::min(kFractalRows, grid.n - i1 * kFractalRows);
    for (std::size_t j1 = 0; j1 < grid.k1; ++j1) {
      const std::size_t cols = std::min(kFractalCols, grid.k - j1 * kFractalCols);
      std::uint8_t* to = out + (j1 * grid.n1 + i1) * kFractalBytes;
      const std::uint8_t* from = m.data + static_cast<std::ptrdiff_t>(i1 * kFractalRows) * m.row +
                                 static_cast<std::ptrdiff_t>(j1 * kFractalCols) * m.col;
      for (std::size_t i = 0; i < rows; ++i, from += m.row, to += kFractalCols) {
        if (m.col == 1 && cols == kFractalCols) {
          std::memcpy(to, from, kFractalCols);
        } else {
          for (std::size_t j = 0; j < cols; ++j) to[j] = from[static_cast<std::ptrdiff_t>(j) * m.col];
        }
      }
    }
  }
}

void histogram(const View& m, std::size_t n, std::size_t k, std::int64_t* counts) {
  std::fill(counts, counts + 256, 0);
  constexpr std::size_t kBlock = 32768;  // keeps the 16-bit counts of the kernel from overflowing
  for (std::size_t i = 0; i < n; ++i) {
    const std::uint8_t* row = m.data + static_cast<std::ptrdiff_t>(i) * m.row;
    for (std::size_t j = 0; j < k; j += kBlock) {
      std::uint16_t part[256] = {};
      const std::size_t width = std::min(kBlock, k - j);
      if (m.col == 1) {
        kernels().histogram(row + j, width, part);
      } else {
        for (std::size_t x = j; x < j + width; ++x) {
          ++part[row[static_cast<std::ptrdiff_t>(x) * m.col]];
        }
      }
      for (std::size_t v = 0; v < 256; ++v) counts[v] += part[v];
    }
  }
}

}  // namespace slc1
