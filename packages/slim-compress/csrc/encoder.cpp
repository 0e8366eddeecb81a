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

// Codes of eleven bits and an escape byte for each byte of a tile.
constexpr std::size_t kMaxPayload = kMaxTileBytes * kMaxCodeBits / 8 + kMaxTileBytes + 1024;

class Encoder {
 public:
  Encoder(const View& matrix, std::size_t n, std::size_t k, const EncodeOptions& options)
      : matrix_(matrix), grid_(n, k, options.tile_n, options.tile_k), options_(options) {}

  Encoded run() {
    parts_.resize(grid_.tiles() * kStreams);
    fill_.resize(grid_.tiles());
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

  // Of a large matrix every fourth row is counted: enough to make tables by.
  std::size_t row_step() const {
    constexpr std::size_t kTilesForSample = 256;
    return options_.escapes && grid_.tiles() >= kTilesForSample ? 4 : 1;
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
    const std::size_t step = row_step();
    for (std::size_t s = 0; s < kStreams; ++s) {
      counts[s].fill(0);
      if (in_place) {
        kernels().histogram(m.data + s * kFractalCols, m.row * static_cast<std::ptrdiff_t>(step),
                            box.rows / step, kFractalCols, counts[s].data());
        for (auto& count : counts[s]) count = static_cast<std::uint16_t>(count * step);
      } else {
        kernels().histogram(scratch + s * part, 0, 1, part, counts[s].data());
      }
    }
    fill_[tile] = looks_constant(counts, part) && is_constant(box, scratch, in_place);
  }

  static bool looks_constant(const PartCounts* counts, std::size_t part) {
    const auto value = std::find(counts[0].begin(), counts[0].end(), part) - counts[0].begin();
    if (value == 256) return false;
    return std::all_of(counts, counts + kStreams,
                       [&](const PartCounts& c) { return c[value] == part; });
  }

  bool is_constant(const TileBox& box, std::uint8_t* scratch, bool in_place) const {
    if (in_place) gather_tile(box, matrix_, scratch);
    return std::memcmp(scratch, scratch + 1, box.bytes() - 1) == 0;
  }

  void choose() {
    std::vector<const PartCounts*> coded;
    std::vector<std::size_t> place;
    for (std::size_t tile = 0; tile < grid_.tiles() && !options_.fast; ++tile) {
      if (fill_[tile] != 0) continue;
      for (std::size_t s = 0; s < kStreams; ++s) {
        place.push_back(tile * kStreams + s);
        coded.push_back(&parts_[place.back()]);
      }
    }
    TableChoice choice =
        choose_tables(coded, {options_.max_tables, options_.escapes, row_step() > 1});
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

  // A slot that holds the tile in any mode; the gaps are closed afterwards. What is not written
  // takes address space, but no memory.
  void place_slots() {
    entries_.resize(grid_.tiles());
    slot_at_.resize(grid_.tiles());
    std::size_t at = 0;
    for (std::size_t tile = 0; tile < grid_.tiles(); ++tile) {
      slot_at_[tile] = at;
      at += fill_[tile] != 0 ? 0 : TileBox(grid_, tile).bytes();
    }
    slots_ = allocate(at + kGuardBytes);
  }

  static std::size_t nib_size(const std::uint8_t* tile, std::size_t size) {
    std::size_t escapes = 0;
    for (std::size_t i = 0; i < size; ++i) escapes += static_cast<std::uint8_t>(tile[i] + 7) > 14;
    return size / 2 + escapes;
  }

  void encode_all() {
    parallel_for(grid_.tiles(), options_.threads, [&] {
      return [&, bytes = std::vector<std::uint8_t>(kMaxTileBytes),
              payload = std::vector<std::uint8_t>(kMaxPayload)](
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
    if (fill_[tile] != 0) {
      e.mode = Mode::kFill;
      e.fill = bytes[0];
      return;
    }
    std::size_t length = size;
    const std::uint8_t* chosen = bytes;
    if (!tables_.empty()) {
      const std::size_t coded = kernels().huf_encode(
          encode_tables_.data(), &table_of_[tile * kStreams], bytes, size, payload);
      if (coded < size) {
        e.mode = Mode::kHuf;
        length = coded;
        chosen = payload;
      }
    }
    if (length > size / 2 && nib_size(bytes, size) < length) {
      e.mode = Mode::kNib;
      length = kernels().nib_encode(bytes, size, payload);
      chosen = payload;
    }
    e.length = static_cast<std::uint16_t>(length);
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
  std::vector<std::uint8_t> fill_;  // by tile: 1 if all its bytes are equal
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
