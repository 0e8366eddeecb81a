#include "survey.hpp"

#include "kernels.hpp"
#include "parallel.hpp"

namespace slc1 {
namespace {

constexpr std::size_t kEnoughTiles = 32;  // a megabyte: enough to make tables by

// `count` tiles, one somewhere in each of as many equal runs.
std::vector<std::size_t> spread(std::size_t tiles, std::size_t count) {
  const std::size_t run = tiles / count;
  std::vector<std::size_t> chosen(count);
  for (std::size_t i = 0; i < count; ++i) {
    constexpr std::uint32_t kGoldenRatio = 2654435769U;  // unlike places within the runs
    const std::uint64_t place = static_cast<std::uint32_t>(i * kGoldenRatio);
    chosen[i] = i * run + static_cast<std::size_t>(place * run >> 32);
  }
  return chosen;
}

}  // namespace

bool is_sampled(const Grid& grid) { return grid.tiles() >= 3 * kEnoughTiles; }

std::vector<PartCounts> count_parts(const View& matrix, const Grid& grid, bool sampled,
                                    std::size_t threads) {
  const std::vector<std::size_t> tiles =
      spread(grid.tiles(), sampled ? kEnoughTiles : grid.tiles());
  std::vector<PartCounts> parts(tiles.size() * kStreams);
  std::vector<std::uint8_t> constant(tiles.size());
  parallel_for(tiles.size(), threads, [&] {
    return [&, bytes = std::vector<std::uint8_t>(kMaxTileBytes)](std::size_t i) mutable {
      const TileBox box(grid, tiles[i]);
      gather_tile(box, matrix, bytes.data());
      constant[i] = is_constant(bytes.data(), box.bytes());
      const std::size_t part = box.bytes() / kStreams;
      for (std::size_t s = 0; s < kStreams; ++s) {
        kernels().histogram(bytes.data() + s * part, part, parts[i * kStreams + s].data());
      }
    };
  });
  std::size_t kept = 0;
  for (std::size_t p = 0; p < parts.size(); ++p) {
    if (constant[p / kStreams] == 0) parts[kept++] = parts[p];
  }
  parts.resize(kept);
  if (kept == 0 && sampled) return count_parts(matrix, grid, false, threads);
  return parts;
}

}  // namespace slc1
