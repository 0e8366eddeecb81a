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
    histograms_.resize(grid_.tiles());
    count_all();
    choice_ = choose_tables(histograms_, options_);
    encode_tables_.resize(choice_.tables.size());
    for (std::size_t t = 0; t < choice_.tables.size(); ++t) {
      build_encode_table(choice_.tables[t], encode_tables_[t]);
    }
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

  void count_tile(std::size_t tile, std::uint8_t* scratch) {
    const TileBox box(grid_, tile);
    std::uint32_t counts[256] = {};
    const bool padded = box.rows * box.cols != box.bytes();
    if (matrix_.col == 1 && !padded) {
      const View m = box.within(matrix_);
      kernels().histogram(m.data, m.row, box.rows, box.cols, counts);
    } else {
      gather_tile(box, matrix_, scratch);
      kernels().histogram(scratch, 0, 1, box.bytes(), counts);
    }
    for (std::size_t v = 0; v < 256; ++v) {
      histograms_[tile][v] = static_cast<std::uint16_t>(counts[v]);
    }
  }

  // A slot that holds the tile in whatever mode it will take; the gaps are closed afterwards.
  void place_slots() {
    entries_.resize(grid_.tiles());
    std::uint64_t at = 0;
    for (std::size_t tile = 0; tile < grid_.tiles(); ++tile) {
      entries_[tile].offset = at;
      entries_[tile].table = choice_.table_of[tile];
      at += slot_bytes(tile);
    }
    slots_ = allocate(at + kGuardBytes);
  }

  std::size_t slot_bytes(std::size_t tile) const {
    const std::size_t bytes = TileBox(grid_, tile).bytes();
    if (is_fill(tile)) return 0;
    std::size_t most = bytes;
    if (const std::size_t huf = huf_bound(tile); huf < bytes) most = huf;
    if (nib_size(tile) < bytes) most = std::max(most, std::min(bytes, nib_size(tile)));
    return most;
  }

  bool is_fill(std::size_t tile) const {
    const std::size_t bytes = TileBox(grid_, tile).bytes();
    for (const auto count : histograms_[tile]) {
      if (count != 0) return count == bytes;
    }
    return false;
  }

  std::size_t huf_bound(std::size_t tile) const {
    if (choice_.tables.empty()) return ~std::size_t{0};
    const auto& table = choice_.tables[choice_.table_of[tile]];
    return tile_cost_bits(table, histograms_[tile]) / 8 + 3 * kStreams + 1;
  }

  std::size_t nib_size(std::size_t tile) const {
    std::size_t size = TileBox(grid_, tile).bytes() / 2;
    for (std::size_t v = 8; v <= 248; ++v) size += histograms_[tile][v];
    return size;
  }

  void encode_all() {
    parallel_for(grid_.tiles(), options_.threads, [&] {
      return [&, tile_bytes = std::vector<std::uint8_t>(kMaxTileBytes),
              payload = std::vector<std::uint8_t>(kMaxTileBytes + 2 * kWriteSlack)](
                 std::size_t tile) mutable {
        encode_tile(tile, tile_bytes.data(), payload.data());
      };
    });
  }

  void encode_tile(std::size_t tile, std::uint8_t* bytes, std::uint8_t* payload) {
    const TileBox box(grid_, tile);
    const std::size_t size = box.bytes();
    gather_tile(box, matrix_, bytes);
    Entry& e = entries_[tile];
    e.crc = kernels().crc32c(bytes, size);
    const std::uint8_t* chosen = bytes;
    e.mode = Mode::kRaw;
    e.length = static_cast<std::uint32_t>(size);
    const std::size_t nib = nib_size(tile);
    if (is_fill(tile)) {
      e.mode = Mode::kFill;
      e.fill = bytes[0];
      e.length = 0;
    } else if (options_.fast && nib < size) {
      take_nib(bytes, size, payload, e, chosen);
    } else if (huf_bound(tile) < size) {
      const std::size_t length = kernels().huf_encode(encode_tables_[e.table], bytes, size, payload);
      if (length <= nib) {
        e.mode = Mode::kHuf;
        e.length = static_cast<std::uint32_t>(length);
        chosen = payload;
      } else {
        take_nib(bytes, size, payload, e, chosen);
      }
    } else if (nib < size) {
      take_nib(bytes, size, payload, e, chosen);
    }
    if (e.mode != Mode::kHuf) e.table = 0;
    std::memcpy(slots_.get() + e.offset, chosen, e.length);
  }

  static void take_nib(const std::uint8_t* bytes, std::size_t size, std::uint8_t* payload,
                       Entry& e, const std::uint8_t*& chosen) {
    e.mode = Mode::kNib;
    e.length = static_cast<std::uint32_t>(kernels().nib_encode(bytes, size, payload));
    chosen = payload;
  }

  Encoded assemble() {
    std::uint64_t end = 0;
    for (auto& e : entries_) {
      std::memmove(slots_.get() + end, slots_.get() + e.offset, e.length);
      e.offset = end;
      end += e.length;
    }
    std::memset(slots_.get() + end, 0, kGuardBytes);
    Encoded result;
    result.weight_size = end + kGuardBytes;
    result.weight = shrink(result.weight_size);
    Header header{static_cast<std::uint32_t>(grid_.n),
                  static_cast<std::uint32_t>(grid_.k),
                  static_cast<std::uint16_t>(grid_.tile_n),
                  static_cast<std::uint16_t>(grid_.tile_k),
                  static_cast<std::uint32_t>(grid_.tiles()),
                  static_cast<std::uint8_t>(choice_.tables.size()),
                  options_.flags,
                  result.weight_size,
                  std::uint64_t{grid_.n} * grid_.k};
    result.index.resize(index_bytes(header));
    std::uint8_t* at = result.index.data() + kHeaderBytes;
    for (const auto& table : choice_.tables) {
      write_table(table, at);
      at += kTableBytes;
    }
    for (const auto& e : entries_) {
      write_entry(e, at);
      at += kEntryBytes;
    }
    write_header(header, result.index.data());
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
  std::vector<TileCounts> histograms_;
  TableChoice choice_;
  std::vector<EncodeTable> encode_tables_;
  std::vector<Entry> entries_;
  Buffer slots_{nullptr, std::free};
};

}  // namespace

Encoded encode(const View& matrix, std::size_t n, std::size_t k, const EncodeOptions& options) {
  return Encoder(matrix, n, k, options).run();
}

}  // namespace slc1
