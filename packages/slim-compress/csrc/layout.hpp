// FRACTAL_NZ: matrices cut into 16 x 32 byte fractals, and the tiles of the codec cut from them.
#pragma once

#include <algorithm>

#include "common.hpp"

namespace slc1 {

// A matrix of bytes somewhere in memory, element (i, j) at data + i * row + j * col.
struct View {
  std::uint8_t* data;
  std::ptrdiff_t row;
  std::ptrdiff_t col;
};

// Size of a matrix of `n` x `k` bytes in fractals and tiles.
struct Grid {
  std::size_t n, k;            // rows, columns
  std::size_t tile_n, tile_k;  // fractals of a whole tile
  std::size_t n1, k1;          // fractals
  std::size_t tiles_n, tiles_k;

  Grid(std::size_t rows, std::size_t cols, std::size_t tn, std::size_t tk)
      : n(rows), k(cols), tile_n(tn), tile_k(tk),
        n1(ceil_div(rows, kFractalRows)), k1(ceil_div(cols, kFractalCols)),
        tiles_n(ceil_div(n1, tn)), tiles_k(ceil_div(k1, tk)) {}

  std::size_t tiles() const { return tiles_n * tiles_k; }
};

// The part of the grid that one tile covers.
struct TileBox {
  std::size_t row0, col0;          // first element
  std::size_t rows, cols;          // elements that exist, without padding
  std::size_t fractals_n, fractals_k;

  TileBox(const Grid& grid, std::size_t tile) {
    const std::size_t tn = tile / grid.tiles_k;
    const std::size_t tk = tile % grid.tiles_k;
    row0 = tn * grid.tile_n * kFractalRows;
    col0 = tk * grid.tile_k * kFractalCols;
    fractals_n = std::min(grid.tile_n, grid.n1 - tn * grid.tile_n);
    fractals_k = std::min(grid.tile_k, grid.k1 - tk * grid.tile_k);
    rows = std::min(fractals_n * kFractalRows, grid.n - row0);
    cols = std::min(fractals_k * kFractalCols, grid.k - col0);
  }
  std::size_t bytes() const { return fractals_n * fractals_k * kFractalBytes; }
  View within(const View& m) const {
    return {m.data + static_cast<std::ptrdiff_t>(row0) * m.row +
                static_cast<std::ptrdiff_t>(col0) * m.col, m.row, m.col};
  }
};

// Copies the box out of (into) a matrix to (from) tile order; padding is written as zeros.
void gather_tile(const TileBox& box, const View& matrix, std::uint8_t* tile);
void scatter_tile(const TileBox& box, const std::uint8_t* tile, const View& matrix);

}  // namespace slc1
