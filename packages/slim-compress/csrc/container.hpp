// The index array of a compressed weight: header, code tables, one entry for each tile.
#pragma once

#include <vector>

#include "huffman.hpp"
#include "layout.hpp"

namespace slc1 {

constexpr std::size_t kHeaderBytes = 28;
constexpr std::size_t kCrcAt = 24;  // in the header
constexpr std::size_t kEntryBytes = 8;
constexpr std::size_t kGuardBytes = 8;
constexpr std::uint32_t kMagic = 0x31434C53;  // "SLC1"
constexpr std::uint8_t kVersion = 1;
constexpr std::uint8_t kFlagTransposed = 1;

struct Entry {
  std::uint32_t crc = 0;     // CRC-32C of the decoded tile
  std::uint16_t length = 0;  // payload bytes
  Mode mode = Mode::kRaw;
  std::uint8_t fill = 0;
};

struct Header {
  std::uint8_t tables, flags, tile_n, tile_k;
  std::uint32_t n, k;
  std::uint64_t weight_bytes;
};

std::vector<std::uint8_t> write_index(const Header& header, const std::vector<CodeTable>& tables,
                                      const std::vector<Entry>& entries);

struct Problem {
  std::int64_t tile = -1;  // -1: the stream as a whole
  const char* reason = nullptr;
};

// A checked view of a compressed weight. Nothing is allocated from sizes that were not checked
// against the bytes that are there.
class Container {
 public:
  // Returns a problem with a reason if the arrays are not a well-formed stream.
  Problem open(const std::uint8_t* index, std::size_t index_size, std::size_t weight_size);

  const Header& header() const { return header_; }
  Grid grid() const { return {header_.n, header_.k, header_.tile_n, header_.tile_k}; }
  std::size_t tiles() const { return offsets_.size(); }
  const std::vector<CodeTable>& tables() const { return tables_; }
  Entry entry(std::size_t tile) const;
  std::uint64_t offset(std::size_t tile) const { return offsets_[tile]; }  // of the payload

 private:
  Problem check_header(std::size_t index_size, std::size_t weight_size);
  Problem read_tables(std::size_t index_size);  // after which the tile count is known to be true
  Problem check_entries();

  const std::uint8_t* index_ = nullptr;
  const std::uint8_t* entries_ = nullptr;
  Header header_{};
  std::vector<CodeTable> tables_;
  std::vector<std::uint64_t> offsets_;
};

}  // namespace slc1
