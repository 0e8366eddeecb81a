#include "container.hpp"

#include "kernels.hpp"

namespace slc1 {
namespace {

constexpr std::uint64_t kMaxSide = std::uint64_t{1} << 31;

std::uint32_t index_crc(const std::uint8_t* index, std::size_t size) {
  // The field itself counts as zero.
  std::vector<std::uint8_t> copy(index, index + size);
  std::memset(copy.data() + kCrcAt, 0, 4);
  return kernels().crc32c(copy.data(), size);
}

}  // namespace

std::vector<std::uint8_t> write_index(const Header& h, const std::vector<CodeTable>& tables,
                                      const std::vector<Entry>& entries) {
  std::size_t size = kHeaderBytes + entries.size() * kEntryBytes;
  for (const auto& table : tables) size += table_bytes(table);
  std::vector<std::uint8_t> index(size);
  std::uint8_t* at = index.data();
  store(at, kMagic);
  at[4] = kVersion;
  at[5] = h.tables;
  at[6] = h.flags;
  at[7] = static_cast<std::uint8_t>(h.tile_n | h.tile_k << 4);
  store(at + 8, h.n);
  store(at + 12, h.k);
  store(at + 16, h.weight_bytes);
  at += kHeaderBytes;
  for (const auto& table : tables) {
    write_table(table, at);
    at += table_bytes(table);
  }
  for (const auto& entry : entries) {
    store(at, entry.crc);
    store(at + 4, entry.length);
    at[6] = static_cast<std::uint8_t>(entry.mode);
    at[7] = entry.fill;
    at += kEntryBytes;
  }
  store(index.data() + kCrcAt, index_crc(index.data(), size));
  return index;
}

Entry Container::entry(std::size_t tile) const {
  const std::uint8_t* p = entries_ + tile * kEntryBytes;
  return {load32(p), load16(p + 4), static_cast<Mode>(p[6]), p[7]};
}

Problem Container::open(const std::uint8_t* index, std::size_t index_size,
                        std::size_t weight_size) {
  index_ = index;
  tables_.clear();
  if (Problem p = check_header(index_size, weight_size); p.reason != nullptr) return p;
  if (index_crc(index, index_size) != load32(index + kCrcAt)) {
    return {-1, "the checksum of the index does not match"};
  }
  if (Problem p = read_tables(index_size); p.reason != nullptr) return p;
  return check_entries();
}

Problem Container::read_tables(std::size_t index_size) {
  std::size_t at = kHeaderBytes;
  for (std::size_t t = 0; t < header_.tables; ++t) {
    CodeTable table;
    const Verdict v = read_table(index_ + at, index_size - at, table);
    if (!v) return {-1, v.reason};
    tables_.push_back(table);
    at += table_bytes(table);
  }
  entries_ = index_ + at;
  // A product of two sides below 2^32: no overflow.
  const std::size_t tiles = grid().tiles();
  if (index_size - at != tiles * kEntryBytes) {
    return {-1, "the index length does not fit its header"};
  }
  return {};
}

Problem Container::check_header(std::size_t index_size, std::size_t weight_size) {
  if (index_size < kHeaderBytes) return {-1, "the index is shorter than its header"};
  const std::uint8_t* p = index_;
  if (load32(p) != kMagic) return {-1, "the index does not start with SLC1"};
  if (p[4] != kVersion) return {-1, "the format version is not 1"};
  header_ = {p[5],          p[6],           static_cast<std::uint8_t>(p[7] & 15),
             static_cast<std::uint8_t>(p[7] >> 4), load32(p + 8), load32(p + 12), load64(p + 16)};
  const Header& h = header_;
  if (h.n == 0 || h.k == 0 || h.n > kMaxSide || h.k > kMaxSide) {
    return {-1, "the matrix size is zero or above 2^31"};
  }
  if (h.tile_n < 1 || h.tile_n > kMaxTileFractals || h.tile_k < 1 || h.tile_k > kMaxTileFractals) {
    return {-1, "the tile size is not 1 to 8 fractals"};
  }
  if (h.tables > kMaxTables) return {-1, "there are more than 4 code tables"};
  if (h.flags > kFlagTransposed) return {-1, "an unknown flag is set"};
  if (h.weight_bytes != weight_size) return {-1, "the weight length does not fit the header"};
  if (weight_size < kGuardBytes) return {-1, "the weight is shorter than its guard"};
  return {};
}

Problem Container::check_entries() {
  const Grid g = grid();
  const std::uint64_t room = header_.weight_bytes - kGuardBytes;
  offsets_.resize(g.tiles());
  std::uint64_t end = 0;
  for (std::size_t t = 0; t < offsets_.size(); ++t) {
    const auto tile = static_cast<std::int64_t>(t);
    const Entry e = entry(t);
    const std::size_t bytes = TileBox(g, t).bytes();
    if (e.mode > Mode::kHuf) return {tile, "unknown tile mode"};
    if (e.mode == Mode::kHuf && tables_.empty()) return {tile, "no such code table"};
    if (e.mode != Mode::kFill && e.fill != 0) return {tile, "a fill byte is given but not used"};
    const std::size_t exact = e.mode == Mode::kFill ? 0 : bytes;
    if (e.mode <= Mode::kFill ? e.length != exact : e.length >= bytes) {
      return {tile, "the payload length does not fit the tile mode"};
    }
    if (e.length > room - end) return {tile, "the payload lies outside the weight"};
    offsets_[t] = end;
    end += e.length;
  }
  if (end != room) return {-1, "the payloads do not fill the weight"};
  return {};
}

}  // namespace slc1
