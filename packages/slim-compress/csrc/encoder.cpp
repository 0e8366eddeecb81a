#include <algorithm>

#include "codec.hpp"
#include "output.hpp"
#include "parallel.hpp"
#include "survey.hpp"

namespace slc1 {
namespace {

// What a thread needs: a tile, and as much for its payload, of which kernels may touch the last
// kWriteSlack bytes. A coded payload that would reach them is not worth having.
constexpr std::size_t kScratch = 2 * kMaxTileBytes;
constexpr std::size_t kMaxCoded = kMaxTileBytes - kWriteSlack;

class Encoder {
 public:
  Encoder(const View& matrix, std::size_t n, std::size_t k, const EncodeOptions& options)
      : matrix_(matrix), grid_(n, k, options.tile_n, options.tile_k), options_(options),
        sampled_(options.escapes && is_sampled(grid_)) {}

  Encoded run() {
    if (!options_.fast) make_tables();
    entries_.resize(grid_.tiles());
    // Two for each thread: seldom waited for, and as much memory as its scratch at most.
    Output output(kGuardBytes + payload_limit(), 2 * options_.threads);
    encode_all(output);
    Encoded result;
    result.weight = output.finish(kGuardBytes, result.weight_size);
    result.index = make_index(result.weight_size);
    return result;
  }

 private:
  void make_tables() {
    const std::vector<PartCounts> parts =
        count_parts(matrix_, grid_, sampled_, options_.threads);
    tables_ = choose_tables(parts, {options_.max_tables, options_.escapes, sampled_});
    picker_ = TablePicker(tables_);
    // Tables of pairs are worth their making from a few dozen tiles on.
    constexpr std::size_t kTilesForPairs = 32;
    for (const auto& table : tables_) {
      encode_tables_.emplace_back(table, grid_.tiles() >= kTilesForPairs);
    }
  }

  std::size_t payload_limit() const { return grid_.n1 * grid_.k1 * kFractalBytes; }

  void encode_all(Output& output) {
    parallel_for(grid_.tiles(), options_.threads, [&] {
      return [&, scratch = std::vector<std::uint8_t>(kScratch)](std::size_t tile) mutable {
        encode_tile(tile, scratch.data(), scratch.data() + kMaxTileBytes, output);
      };
    });
  }

  static std::size_t nib_size(const std::uint8_t* tile, std::size_t size) {
    constexpr std::size_t kBlock = 64;  // counted in bytes, which makes good vector code
    std::size_t escapes = 0;
    for (std::size_t i = 0; i < size; i += kBlock) {
      std::uint8_t count = 0;
      for (std::size_t j = i; j < i + kBlock; ++j) {
        count = static_cast<std::uint8_t>(count + (static_cast<std::uint8_t>(tile[j] + 7) > 14));
      }
      escapes += count;
    }
    return size / 2 + escapes;
  }

  void encode_tile(std::size_t tile, std::uint8_t* bytes, std::uint8_t* payload, Output& output) {
    const TileBox box(grid_, tile);
    const std::size_t size = box.bytes();
    gather_tile(box, matrix_, bytes);
    Entry& e = entries_[tile];
    e.crc = kernels().crc32c(bytes, size);
    const std::uint8_t* chosen = bytes;
    const std::uint8_t* end = bytes + size;
    auto take = [&](Mode mode, const std::uint8_t* coded_end) {
      e.mode = mode;
      chosen = payload;
      end = coded_end;
    };
    auto length = [&] { return static_cast<std::size_t>(end - chosen); };
    if (is_constant(bytes, size)) {
      e.fill = bytes[0];
      take(Mode::kFill, payload);
    } else if (!tables_.empty()) {
      const std::uint8_t* const coded =
          encode_huf(bytes, size, payload, payload + std::min(size - 1, kMaxCoded));
      if (coded != nullptr) take(Mode::kHuf, coded);
    }
    if (length() > size / 2 && nib_size(bytes, size) < std::min(length(), kMaxCoded + 1)) {
      take(Mode::kNib, kernels().nib_encode(bytes, size, payload, payload + kMaxCoded));
    }
    e.length = static_cast<std::uint16_t>(length());
    output.put(tile, chosen, length());
  }

  // Writes the HUF payload of a tile and returns its end; nullptr if that lies past `limit`.
  std::uint8_t* encode_huf(const std::uint8_t* bytes, std::size_t size, std::uint8_t* payload,
                           const std::uint8_t* limit) const {
    constexpr unsigned kLengthBits = 13;
    const std::size_t part = size / kStreams;
    const std::size_t step = sampled_ ? 4 : 1;
    const EncodeTable* table[kStreams];
    std::uint8_t* next = payload + 2 * kStreams;
    for (std::size_t s = 0; s < kStreams; ++s) {
      const std::uint8_t choice = picker_.pick(bytes + s * part, part, step);
      table[s] = &encode_tables_[choice];
      std::uint8_t* const end = kernels().encode_part(*table[s], bytes + s * part, part, next, limit);
      if (end == nullptr) return nullptr;
      const auto length = static_cast<unsigned>(end - next);
      store(payload + 2 * s, static_cast<std::uint16_t>(length | unsigned{choice} << kLengthBits));
      next = end;
    }
    for (std::size_t s = 0; s < kStreams; ++s) {
      if (table[s]->escapes.empty) continue;
      next = kernels().collect_escapes(table[s]->escapes, bytes + s * part, part, next, limit);
      if (next == nullptr) return nullptr;
    }
    return next;
  }

  std::vector<std::uint8_t> make_index(std::size_t weight_size) {
    const bool coded = std::any_of(entries_.begin(), entries_.end(),
                                   [](const Entry& e) { return e.mode == Mode::kHuf; });
    if (!coded) tables_.clear();
    const Header header{static_cast<std::uint8_t>(tables_.size()),
                        options_.flags,
                        static_cast<std::uint8_t>(grid_.tile_n),
                        static_cast<std::uint8_t>(grid_.tile_k),
                        static_cast<std::uint32_t>(grid_.n),
                        static_cast<std::uint32_t>(grid_.k),
                        weight_size};
    return write_index(header, tables_, entries_);
  }

  View matrix_;
  Grid grid_;
  EncodeOptions options_;
  bool sampled_;
  std::vector<CodeTable> tables_;
  TablePicker picker_{{}};
  std::vector<EncodeTable> encode_tables_;
  std::vector<Entry> entries_;
};

}  // namespace

Encoded encode(const View& matrix, std::size_t n, std::size_t k, const EncodeOptions& options) {
  return Encoder(matrix, n, k, options).run();
}

}  // namespace slc1
