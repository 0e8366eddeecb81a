#include "container.hpp"

#include "kernels.hpp"

namespace slc1 {
namespace {

constexpr std::size_t kCrcAt = 28;
constexpr std::uint64_t kMaxSide = std::uint64_t{1} << 31;

std::uint32_t index_crc(const std::uint8_t* index, std::size_t size) {
  // The field itself counts as zero.
  std::vector<std::uint8_t> copy(index, index + size);
  std::memset(copy.data() + kCrcAt, 0, 4);
  return kernels().crc32c(copy.data(), size);
}

}  // namespace

void write_entry(const Entry& entry, std::uint8_t* out) {
  store(out, entry.crc);
  store(out + 4, entry.length);
  out[6] = static_cast<std::uint8_t>(entry.mode);
  out[7] = entry.fill;
}

void write_header(const Header& h, std::uint8_t* index, std::size_t index_size) {
  std::memset(index, 0, kHeaderBytes);
  store(index, kMagic);
  store(index + 4, kVersion);
  store(index + 6, static_cast<std::uint16_t>(kHeaderBytes));
  store(index + 8, h.n);
  store(index + 12, h.k);
  store(index + 16, h.tile_n);
  store(index + 18, h.tile_k);
  store(index + 20, h.tiles);
  index[24] = h.tables;
  index[25] = h.flags;
  store(index + 32, h.weight_bytes);
  store(index + 40, h.raw_bytes);
  store(index + kCrcAt, index_crc(index, index_size));
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
  if (index_size - at != std::size_t{header_.tiles} * kEntryBytes) {
    return {-1, "the index length does not fit its header"};
  }
  return {};
}

Problem Container::check_header(std::size_t index_size, std::size_t weight_size) {
  if (index_size < kHeaderBytes) return {-1, "the index is shorter than its header"};
  const std::uint8_t* p = index_;
  if (load32(p) != kMagic) return {-1, "the index does not start with SLC1"};
  if (load16(p + 4) != kVersion) return {-1, "the format version is not 1"};
  if (load16(p + 6) != kHeaderBytes) return {-1, "the header length is not 64"};
  header_ = {load32(p + 8), load32(p + 12), load16(p + 16), load16(p + 18), load32(p + 20),
             p[24], p[25], load64(p + 32), load64(p + 40)};
  const Header& h = header_;
  if (h.n == 0 || h.k == 0 || h.n > kMaxSide || h.k > kMaxSide) {
    return {-1, "the matrix size is zero or above 2^31"};
  }
  if (h.tile_n < 1 || h.tile_n > kMaxTileFractals || h.tile_k < 1 || h.tile_k > kMaxTileFractals) {
    return {-1, "the tile size is not 1 to 8 fractals"};
  }
  if (h.tables > kMaxTables) return {-1, "there are more than 4 code tables"};
  if (h.flags > kFlagTransposed) return {-1, "an unknown flag is set"};
  if (load16(p + 26) != 0 || load64(p + 48) != 0 || load64(p + 56) != 0) {
    return {-1, "non-zero padding in the header"};
  }
  if (h.raw_bytes != std::uint64_t{h.n} * h.k) return {-1, "the raw size is not rows times columns"};
  if (h.tiles != grid().tiles()) return {-1, "the tile count does not fit the matrix size"};
  if ((index_size - kHeaderBytes) / kEntryBytes < h.tiles) {
    return {-1, "the index length does not fit its header"};
  }
  if (h.weight_bytes != weight_size) return {-1, "the weight length does not fit the header"};
  if (weight_size < kGuardBytes) return {-1, "the weight is shorter than its guard"};
  return {};
}

Problem Container::check_entries() {
  const Grid g = grid();
  const std::uint64_t room = header_.weight_bytes - kGuardBytes;
  offsets_.resize(header_.tiles);
  std::uint64_t end = 0;
  for (std::size_t t = 0; t < header_.tiles; ++t) {
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
