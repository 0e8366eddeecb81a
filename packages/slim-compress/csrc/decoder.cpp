#include <atomic>

#include "codec.hpp"
#include "parallel.hpp"

namespace slc1 {

Decoder::Decoder(const Container& container, const std::uint8_t* weight, std::size_t weight_size)
    : container_(container), weight_(weight), weight_size_(weight_size) {
  tables_.resize(container.tables().size());
  for (std::size_t t = 0; t < tables_.size(); ++t) {
    build_decode_table(container.tables()[t], tables_[t]);
  }
}

Problem Decoder::check_guard() const {
  for (std::size_t i = weight_size_ - kGuardBytes; i < weight_size_; ++i) {
    if (weight_[i] != 0) return {-1, "non-zero guard after the payloads"};
  }
  return {};
}

Problem Decoder::decode_tile(std::size_t tile, std::uint8_t* out) const {
  const Entry e = container_.entry(tile);
  const std::size_t bytes = TileBox(container_.grid(), tile).bytes();
  const std::uint8_t* payload = weight_ + container_.offset(tile);
  const std::uint8_t* readable_end = weight_ + weight_size_;
  const Kernels& kernel = kernels();
  Verdict verdict;
  switch (e.mode) {
    case Mode::kRaw:
      std::memcpy(out, payload, bytes);
      break;
    case Mode::kFill:
      std::memset(out, e.fill, bytes);
      break;
    case Mode::kNib:
      verdict = kernel.nib_decode(payload, e.length, readable_end, out, bytes);
      break;
    case Mode::kHuf:
      verdict = kernel.huf_decode(tables_.data(), tables_.size(), payload, e.length, readable_end,
                                  out, bytes);
      break;
  }
  if (!verdict) return {static_cast<std::int64_t>(tile), verdict.reason};
  if (kernel.crc32c(out, bytes) != e.crc) {
    return {static_cast<std::int64_t>(tile), "the checksum of the decoded tile does not match"};
  }
  return {};
}

Problem Decoder::decode(const View& matrix, std::size_t threads) const {
  const Grid grid = container_.grid();
  return each_tile(threads, [&](std::size_t tile, const std::uint8_t* bytes) {
    scatter_tile(TileBox(grid, tile), bytes, matrix);
  });
}

Problem Decoder::check(std::size_t threads) const {
  return each_tile(threads, [](std::size_t, const std::uint8_t*) {});
}

// Calls take(tile, bytes) for each tile; after a problem only lower tiles are still looked at, so
// that the tile which is named does not depend on the threads.
template <typename Take>
Problem Decoder::each_tile(std::size_t threads, Take&& take) const {
  if (Problem p = check_guard(); p.reason != nullptr) return p;
  const std::size_t tiles = container_.tiles();
  std::atomic<std::size_t> first_bad{tiles};
  std::mutex guard;
  Problem worst;
  parallel_for(tiles, threads, [&] {
    return [&, scratch = std::vector<std::uint8_t>(kMaxTileBytes + kWriteSlack)](
               std::size_t tile) mutable {
      if (tile > first_bad.load(std::memory_order_relaxed)) return;
      const Problem p = decode_tile(tile, scratch.data());
      if (p.reason == nullptr) {
        take(tile, scratch.data());
        return;
      }
      const std::lock_guard<std::mutex> lock(guard);
      if (tile < first_bad) {
        first_bad = tile;
        worst = p;
      }
    };
  });
  return worst;
}

}  // namespace slc1
