#include "layout.hpp"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace slc1 {
namespace {

#if defined(__SSE2__)
// Rows of whole lines of memory, written past the caches: fetching each line first, only to
// overwrite it, would take most of the time. Returns false if the box has no such rows.
bool stream_tile(const TileBox& box, const std::uint8_t* tile, const View& m) {
  constexpr std::size_t kLine = 2 * kFractalCols;
  if (box.cols % kLine != 0 || m.row % static_cast<std::ptrdiff_t>(kLine) != 0 ||
      reinterpret_cast<std::uintptr_t>(m.data) % kLine != 0) {
    return false;
  }
  const std::size_t column = box.fractals_n * kFractalBytes;
  for (std::size_t i = 0; i < box.rows; ++i) {
    auto* to = reinterpret_cast<__m128i*>(m.data + static_cast<std::ptrdiff_t>(i) * m.row);
    const std::uint8_t* from = tile + i * kFractalCols;
    for (std::size_t j = 0; j < box.cols; j += kFractalCols, from += column, to += 2) {
      const auto* half = reinterpret_cast<const __m128i*>(from);
      _mm_stream_si128(to, _mm_loadu_si128(half));
      _mm_stream_si128(to + 1, _mm_loadu_si128(half + 1));
    }
  }
  _mm_sfence();
  return true;
}
#endif

// Element (i, j) of the box lies at ((j / 32) * fractals_n * 16 + i) * 32 + j % 32 of its tile.
template <typename CopyRow>
void each_piece(const TileBox& box, CopyRow&& copy) {
  const std::size_t column = box.fractals_n * kFractalBytes;
  for (std::size_t i = 0; i < box.rows; ++i) {
    std::size_t j = 0;
    for (std::size_t f = 0; j < box.cols; ++f, j += kFractalCols) {
      copy(i, j, std::min(kFractalCols, box.cols - j), f * column + i * kFractalCols);
    }
  }
}

}  // namespace

void gather_tile(const TileBox& box, const View& matrix, std::uint8_t* tile) {
  if (box.rows % kFractalRows != 0 || box.cols % kFractalCols != 0) {
    std::memset(tile, 0, box.bytes());
  }
  const View m = box.within(matrix);
  if (m.col == 1) {
    each_piece(box, [&](std::size_t i, std::size_t j, std::size_t width, std::size_t at) {
      const std::uint8_t* from = m.data + static_cast<std::ptrdiff_t>(i) * m.row + j;
      if (width == kFractalCols) {
        std::memcpy(tile + at, from, kFractalCols);
      } else {
        std::memcpy(tile + at, from, width);
      }
    });
    return;
  }
  each_piece(box, [&](std::size_t i, std::size_t j, std::size_t width, std::size_t at) {
    const std::uint8_t* from = m.data + static_cast<std::ptrdiff_t>(i) * m.row +
                               static_cast<std::ptrdiff_t>(j) * m.col;
    for (std::size_t x = 0; x < width; ++x, from += m.col) tile[at + x] = *from;
  });
}

void scatter_tile(const TileBox& box, const std::uint8_t* tile, const View& matrix) {
  const View m = box.within(matrix);
#if defined(__SSE2__)
  if (m.col == 1 && stream_tile(box, tile, m)) return;
#endif
  if (m.col == 1) {
    each_piece(box, [&](std::size_t i, std::size_t j, std::size_t width, std::size_t at) {
      std::uint8_t* to = m.data + static_cast<std::ptrdiff_t>(i) * m.row + j;
      if (width == kFractalCols) {
        std::memcpy(to, tile + at, kFractalCols);
      } else {
        std::memcpy(to, tile + at, width);
      }
    });
    return;
  }
  each_piece(box, [&](std::size_t i, std::size_t j, std::size_t width, std::size_t at) {
    std::uint8_t* to = m.data + static_cast<std::ptrdiff_t>(i) * m.row +
                       static_cast<std::ptrdiff_t>(j) * m.col;
    for (std::size_t x = 0; x < width; ++x, to += m.col) *to = tile[at + x];
  });
}

}  // namespace slc1
