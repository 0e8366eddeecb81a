// Which code tables a tensor gets, and which of them each part of a tile uses.
#pragma once

#include <array>
#include <vector>

#include "huffman.hpp"

namespace slc1 {

using PartCounts = std::array<std::uint16_t, 256>;  // of the byte values of one part

struct TableRules {
  std::size_t most = kMaxTables;
  bool escapes = true;        // false: each value that occurs has a code
  bool always_escape = false; // counts are of a sample: a table must hold values that are not in it
};

// 1 to `rules.most` tables, each of which holds every value; none if there are no parts.
std::vector<CodeTable> choose_tables(const std::vector<PartCounts>& parts, const TableRules& rules);

// Finds the cheapest table for a part.
class TablePicker {
 public:
  explicit TablePicker(const std::vector<CodeTable>& tables);

  // Looks at every `step`-th row of 32 bytes of the part.
  std::uint8_t pick(const std::uint8_t* part, std::size_t size, std::size_t step) const;

 private:
  bool single_;
  std::array<std::uint64_t, 256> bits_{};  // of a value under table t in bits 16 t up
};

}  // namespace slc1
