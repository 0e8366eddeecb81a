// Which code tables a tensor gets, and which of them each tile uses.
#pragma once

#include <array>
#include <vector>

#include "huffman.hpp"

namespace slc1 {

struct EncodeOptions;

using TileCounts = std::array<std::uint16_t, 256>;

struct TableChoice {
  std::vector<CodeTable> tables;        // 0 to 4
  std::vector<std::uint8_t> table_of;   // by tile
};

TableChoice choose_tables(const std::vector<TileCounts>& tiles, const EncodeOptions& options);

std::uint64_t tile_cost_bits(const CodeTable& table, const TileCounts& counts);

}  // namespace slc1
