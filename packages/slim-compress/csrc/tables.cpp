#include "tables.hpp"

#include <algorithm>
#include <numeric>

#include "codec.hpp"

namespace slc1 {
namespace {

constexpr std::size_t kRounds = 3;  // of assigning tiles to tables and building the tables anew
constexpr std::uint64_t kSpreadShare = 32;

// Tiles of one value are stored as FILL and need no code.
using Active = std::vector<const TileCounts*>;

Counts sum_counts(const Active& tiles, const std::vector<std::uint8_t>& group, std::size_t wanted) {
  Counts total{};
  for (std::size_t t = 0; t < tiles.size(); ++t) {
    if (group[t] != wanted) continue;
    for (std::size_t v = 0; v < 256; ++v) total[v] += (*tiles[t])[v];
  }
  return total;
}

// Bits a byte, in 1/1024, of each tile under one table.
std::vector<std::uint64_t> density(const Active& tiles, const CodeTable& table) {
  std::vector<std::uint64_t> bits(tiles.size());
  for (std::size_t t = 0; t < tiles.size(); ++t) {
    const auto bytes = std::accumulate(tiles[t]->begin(), tiles[t]->end(), std::uint64_t{0});
    bits[t] = tile_cost_bits(table, *tiles[t]) * 1024 / bytes;
  }
  return bits;
}

// Starts from tiles sorted by how much they cost under the common table, then improves as Lloyd's
// algorithm does: a table for each group, each tile to its cheapest table. A tile is always held
// by the table of its own group, so each gets one that has a code or an escape for all its values.
TableChoice cluster(const Active& tiles, const std::vector<std::uint64_t>& bits,
                    std::size_t groups, bool escapes) {
  std::vector<std::uint32_t> order(tiles.size());
  std::iota(order.begin(), order.end(), 0U);
  std::stable_sort(order.begin(), order.end(),
                   [&](std::uint32_t a, std::uint32_t b) { return bits[a] < bits[b]; });
  TableChoice choice;
  choice.table_of.resize(tiles.size());
  for (std::size_t i = 0; i < order.size(); ++i) {
    choice.table_of[order[i]] = static_cast<std::uint8_t>(i * groups / order.size());
  }
  for (std::size_t round = 0; round < kRounds; ++round) {
    choice.tables.clear();
    for (std::size_t g = 0; g < groups; ++g) {
      const Counts counts = sum_counts(tiles, choice.table_of, g);
      const auto absent = std::count(counts.begin(), counts.end(), 0U);
      if (absent < 256) choice.tables.push_back(build_table(counts, escapes));
    }
    for (std::size_t t = 0; t < tiles.size(); ++t) {
      std::uint64_t best = ~std::uint64_t{0};
      for (std::size_t g = 0; g < choice.tables.size(); ++g) {
        const std::uint64_t cost = tile_cost_bits(choice.tables[g], *tiles[t]);
        if (cost >= best) continue;
        best = cost;
        choice.table_of[t] = static_cast<std::uint8_t>(g);
      }
    }
  }
  return choice;
}

std::uint64_t total_bits(const Active& tiles, const TableChoice& choice) {
  std::uint64_t bits = choice.tables.size() * kTableBytes * 8;
  for (std::size_t t = 0; t < tiles.size(); ++t) {
    bits += tile_cost_bits(choice.tables[choice.table_of[t]], *tiles[t]);
  }
  return bits;
}

TableChoice choose_for(const Active& tiles, const EncodeOptions& options) {
  TableChoice one;
  one.table_of.assign(tiles.size(), 0);
  one.tables.push_back(build_table(sum_counts(tiles, one.table_of, 0), options.escapes));
  if (options.max_tables < 2 || tiles.size() < 2) return one;
  const auto bits = density(tiles, one.tables[0]);
  const auto [low, high] = std::minmax_element(bits.begin(), bits.end());
  // Tiles that all cost the same under one table would not gain from more.
  if (*high - *low <= *high / kSpreadShare) return one;
  TableChoice many =
      cluster(tiles, bits, std::min(options.max_tables, tiles.size()), options.escapes);
  return total_bits(tiles, many) < total_bits(tiles, one) ? many : one;
}

}  // namespace

std::uint64_t tile_cost_bits(const CodeTable& table, const TileCounts& counts) {
  // Without an escape code a value that has no code rules the table out: more than any tile costs.
  constexpr std::uint64_t kImpossible = std::uint64_t{1} << 20;
  std::uint32_t bits = 0;
  const std::uint32_t escape = table.lengths[kEscape] + 8U;
  bool held = table.has_escape();
  std::uint32_t missing = 0;
  for (std::size_t v = 0; v < 256; ++v) {
    const std::uint32_t length = table.lengths[v];
    bits += counts[v] * (length != 0 ? length : escape);
    missing += length != 0 ? 0U : counts[v];
  }
  held |= missing == 0;
  return held ? bits : kImpossible;
}

TableChoice choose_tables(const std::vector<TileCounts>& tiles, const EncodeOptions& options) {
  Active active;
  std::vector<std::size_t> place;
  for (std::size_t t = 0; t < tiles.size(); ++t) {
    if (std::count(tiles[t].begin(), tiles[t].end(), 0) == 255) continue;
    active.push_back(&tiles[t]);
    place.push_back(t);
  }
  TableChoice result;
  if (!active.empty()) result = choose_for(active, options);
  std::vector<std::uint8_t> table_of(tiles.size(), 0);
  for (std::size_t i = 0; i < place.size(); ++i) table_of[place[i]] = result.table_of[i];
  result.table_of = std::move(table_of);
  return result;
}

}  // namespace slc1
