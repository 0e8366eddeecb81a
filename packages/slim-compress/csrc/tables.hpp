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

struct TableRules {
  std::size_t most = kMaxTables;
  bool escapes = true;        // false: each value that occurs has a code
  bool always_escape = false; // counts are of a sample: a table must hold values that are not in it
};

// Each part gets a table that has a code or an escape for all its values.
TableChoice choose_tables(const std::vector<const PartCounts*>& parts, const TableRules& rules);

}  // namespace slc1
