// Which code tables a tensor gets, and which of them each part of a tile uses.
#pragma once

#include <array>
#include <vector>

#include "huffman.hpp"

namespace slc1 {

using PartCounts = std::array<std::uint16_t, 256>;  // of the byte values of one part

struct TableChoice {
  std::vector<CodeTable> tables;       // 0 to 4
  std::vector<std::uint8_t> table_of;  // by part
};

// Each part gets a table that has a code or an escape for all its values. At most `most` tables;
// without `escapes` each value has a code.
TableChoice choose_tables(const std::vector<const PartCounts*>& parts, std::size_t most,
                          bool escapes);

// Bits of a part: codes, and 8 for each escape byte. Huge if the table lacks a value.
std::uint64_t part_cost_bits(const CodeTable& table, const PartCounts& counts);

}  // namespace slc1
