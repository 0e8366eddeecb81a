#include <algorithm>
#include <cstdlib>
#include <new>

#include "codec.hpp"
#include "parallel.hpp"
#include "tables.hpp"

namespace slc1 {
namespace {

using Buffer = std::unique_ptr<std::uint8_t[], void (*)(void*)>;

Buffer allocate(std::size_t size) {
  auto* memory = static_cast<std::uint8_t*>(std::malloc(size));
  if (memory == nullptr) throw std::bad_alloc();
  return {memory, std::free};
}

class Encoder {
 public:
  Encoder(const View& matrix, std::size_t n, std::size_t k, const EncodeOptions& options)
      : matrix_(matrix), grid_(n, k, options.tile_n, options.tile_k), options_(options) {}

  Encoded run() {
    parts_.resize(grid_.tiles() * kStreams);
    count_all();
    choose();
    place_slots();
    encode_all();
    return assemble();
  }

 private:
  void count_all() {
    parallel_for(grid_.tiles(), options_.threads, [&] {
      return [&, scratch = std::vector<std::uint8_t>(kMaxTileBytes)](std::size_t tile) mutable {
        count_tile(tile, scratch.data());
      };
    });
  }

  // Parts of a whole, unpadded tile are columns of fractals and can be counted where they lie.
  void count_tile(std::size_t tile, std::uint8_t* scratch) {
    const TileBox box(grid_, tile);
    PartCounts* counts = &parts_[tile * kStreams];
    const std::size_t part = box.bytes() / kStreams;
    const bool in_place = matrix_.col == 1 && box.fractals_k == kStreams &&
                          box.rows * box.cols == box.bytes();
    if (!in_place) gather_tile(box, matrix_, scratch);
    const View m = box.within(matrix_);
    for (std::size_t s = 0; s < kStreams; ++s) {
      counts[s].fill(0);
      if (in_place) {
        kernels().histogram(m.data + s * kFractalCols, m.row, box.rows, kFractalCols,
                            counts[s].data());
      } else {
        kernels().histogram(scratch + s * part, 0, 1, part, counts[s].data());
      }
    }
  }

  void choose() {
    std::vector<const PartCounts*> coded;
    std::vector<std::size_t> place;
    for (std::size_t tile = 0; tile < grid_.tiles(); ++tile) {
      const bool nib = options_.fast && nib_size(tile) < tile_bytes(tile);
      if (is_fill(tile) || nib) continue;
      for (std::size_t s = 0; s < kStreams; ++s) {
        place.push_back(tile * kStreams + s);
        coded.push_back(&parts_[place.back()]);
      }
    }
    TableChoice choice = choose_tables(coded, options_.max_tables, options_.escapes);
    tables_ = std::move(choice.tables);
    table_of_.assign(parts_.size(), 0);
    for (std::size_t i = 0; i < place.size(); ++i) table_of_[place[i]] = choice.table_of[i];
    // Tables of pairs are worth their making from a few dozen tiles on.
    constexpr std::size_t kTilesForPairs = 32;
    encode_tables_.resize(tables_.size());
    for (std::size_t t = 0; t < tables_.size(); ++t) {
      build_encode_table(tables_[t], grid_.tiles() >= kTilesForPairs, encode_tables_[t]);
    }
  }

  // A slot that holds the tile in whatever mode it will take; the gaps are closed afterwards.
  void place_slots() {
    entries_.resize(grid_.tiles());
    slot_at_.resize(grid_.tiles());
    std::size_t at = 0;
    for (std::size_t tile = 0; tile < grid_.tiles(); ++tile) {
      slot_at_[tile] = at;
      at += slot_bytes(tile);
    }
    slots_ = allocate(at + kGuardBytes);
  }

  std::size_t tile_bytes(std::size_t tile) const { return TileBox(grid_, tile).bytes(); }

  std::size_t slot_bytes(std::size_t tile) const {
    const std::size_t bytes = tile_bytes(tile);
    if (is_fill(tile)) return 0;
    const std::size_t huf = huf_bound(tile);
    const std::size_t nib = nib_size(tile);
    if (huf >= bytes) return nib < bytes ? nib : bytes;
    return nib < bytes ? std::max(huf, nib) : huf;
  }

  bool is_fill(std::size_t tile) const {
    const PartCounts* counts = &parts_[tile * kStreams];
    const std::size_t part = tile_bytes(tile) / kStreams;
    const auto value = std::find(counts[0].begin(), counts[0].end(), part) - counts[0].begin();
    if (value == 256) return false;
    return std::all_of(counts, counts + kStreams,
                       [&](const PartCounts& c) { return c[value] == part; });
  }

  std::size_t huf_bound(std::size_t tile) const {
    if (tables_.empty()) return ~std::size_t{0};
    std::uint64_t bits = 0;
    for (std::size_t p = tile * kStreams; p < (tile + 1) * kStreams; ++p) {
      bits += part_cost_bits(tables_[table_of_[p]], parts_[p]);
    }
    return bits / 8 + 3 * kStreams + 1;
  }

  std::size_t nib_size(std::size_t tile) const {
    std::size_t size = tile_bytes(tile) / 2;
    for (std::size_t p = tile * kStreams; p < (tile + 1) * kStreams; ++p) {
      for (std::size_t v = 8; v <= 248; ++v) size += parts_[p][v];
    }
    return size;
  }

  void encode_all() {
    parallel_for(grid_.tiles(), options_.threads, [&] {
      return [&, bytes = std::vector<std::uint8_t>(kMaxTileBytes),
              payload = std::vector<std::uint8_t>(kMaxTileBytes + 2 * kWriteSlack)](
                 std::size_t tile) mutable {
        encode_tile(tile, bytes.data(), payload.data());
      };
    });
  }

  void encode_tile(std::size_t tile, std::uint8_t* bytes, std::uint8_t* payload) {
    const TileBox box(grid_, tile);
    const std::size_t size = box.bytes();
    gather_tile(box, matrix_, bytes);
    Entry& e = entries_[tile];
    e.crc = kernels().crc32c(bytes, size);
    if (is_fill(tile)) {
      e.mode = Mode::kFill;
      e.fill = bytes[0];
      return;
    }
    const std::size_t nib = nib_size(tile);
    const bool fast = options_.fast && nib < size;
    e.length = static_cast<std::uint16_t>(size);
    const std::uint8_t* chosen = bytes;
    if (!fast && huf_bound(tile) < size) {
      const std::size_t length = kernels().huf_encode(
          encode_tables_.data(), &table_of_[tile * kStreams], bytes, size, payload);
      if (length <= nib) {
        e.mode = Mode::kHuf;
        e.length = static_cast<std::uint16_t>(length);
        chosen = payload;
      }
    }
    if (e.mode == Mode::kRaw && nib < size) {
      e.mode = Mode::kNib;
      e.length = static_cast<std::uint16_t>(kernels().nib_encode(bytes, size, payload));
      chosen = payload;
    }
    std::memcpy(slots_.get() + slot_at_[tile], chosen, e.length);
  }

  Encoded assemble() {
    std::size_t end = 0;
    bool coded = false;
    for (std::size_t tile = 0; tile < grid_.tiles(); ++tile) {
      const Entry& e = entries_[tile];
      std::memmove(slots_.get() + end, slots_.get() + slot_at_[tile], e.length);
      end += e.length;
      coded |= e.mode == Mode::kHuf;
    }
    if (!coded) tables_.clear();
    std::memset(slots_.get() + end, 0, kGuardBytes);
    Encoded result;
    result.weight_size = end + kGuardBytes;
    result.weight = shrink(result.weight_size);
    const Header header{static_cast<std::uint32_t>(grid_.n),
                        static_cast<std::uint32_t>(grid_.k),
                        static_cast<std::uint16_t>(grid_.tile_n),
                        static_cast<std::uint16_t>(grid_.tile_k),
                        static_cast<std::uint32_t>(grid_.tiles()),
                        static_cast<std::uint8_t>(tables_.size()),
                        options_.flags,
                        result.weight_size,
                        std::uint64_t{grid_.n} * grid_.k};
    std::size_t index_size = kHeaderBytes + grid_.tiles() * kEntryBytes;
    for (const auto& table : tables_) index_size += table_bytes(table);
    result.index.resize(index_size);
    std::uint8_t* at = result.index.data() + kHeaderBytes;
    for (const auto& table : tables_) {
      write_table(table, at);
      at += table_bytes(table);
    }
    for (const auto& e : entries_) {
      write_entry(e, at);
      at += kEntryBytes;
    }
    write_header(header, result.index.data(), index_size);
    return result;
  }

  Buffer shrink(std::size_t size) {
    auto* memory = static_cast<std::uint8_t*>(std::realloc(slots_.get(), size));
    if (memory == nullptr) throw std::bad_alloc();
    (void)slots_.release();
    return {memory, std::free};
  }

  View matrix_;
  Grid grid_;
  EncodeOptions options_;
  std::vector<PartCounts> parts_;
  std::vector<CodeTable> tables_;
  std::vector<std::uint8_t> table_of_;  // by part
  std::vector<EncodeTable> encode_tables_;
  std::vector<Entry> entries_;
  std::vector<std::size_t> slot_at_;
  Buffer slots_{nullptr, std::free};
};

}  // namespace

Encoded encode(const View& matrix, std::size_t n, std::size_t k, const EncodeOptions& options) {
  return Encoder(matrix, n, k, options).run();
}

}  // namespace slc1
