// Looking at a matrix before it is coded.
#pragma once

#include <vector>

#include "layout.hpp"
#include "tables.hpp"

namespace slc1 {

// Whether the tables of a matrix are made by a sample of its tiles.
bool is_sampled(const Grid& grid);

// The values of each part of the tiles that are not constant: of all tiles, or of a sample.
std::vector<PartCounts> count_parts(const View& matrix, const Grid& grid, bool sampled,
                                    std::size_t threads);

inline bool is_constant(const std::uint8_t* bytes, std::size_t size) {
  return std::memcmp(bytes, bytes + 1, size - 1) == 0;
}

}  // namespace slc1
