#include "tables.hpp"

#include <algorithm>
#include <numeric>

namespace slc1 {
namespace {

using Parts = std::vector<PartCounts>;
using Groups = std::vector<std::uint8_t>;  // of each part

constexpr std::size_t kRounds = 2;  // of making tables for groups and assigning parts to tables

// More tables are tried if the cost of parts under a common one spreads by a sixteenth, and taken
// if they save a thousandth: several tables share the first-level cache less well.
constexpr std::uint64_t kSpreadShare = 16;
constexpr std::uint64_t kGainShare = 1024;

Counts sum_counts(const Parts& parts, const Groups& groups, std::size_t wanted) {
  Counts total{};
  for (std::size_t p = 0; p < parts.size(); ++p) {
    if (groups[p] != wanted) continue;
    for (std::size_t v = 0; v < 256; ++v) total[v] += parts[p][v];
  }
  return total;
}

// What a value costs under a table, in 16 bits so that sums of products become vector code.
class Prices {
 public:
  explicit Prices(const CodeTable& table) {
    for (std::size_t v = 0; v < 256; ++v) {
      bits_[v] = static_cast<std::int16_t>(code_bits(table, v));
    }
  }
  static unsigned code_bits(const CodeTable& table, std::size_t value) {
    const unsigned length = table.lengths[value];
    return length != 0 ? length : table.lengths[kEscape] + 8U;
  }

  std::uint64_t operator()(const PartCounts& counts) const {
    std::int32_t sum = 0;
    for (std::size_t v = 0; v < 256; ++v) sum += bits_[v] * static_cast<std::int16_t>(counts[v]);
    return static_cast<std::uint64_t>(sum);
  }

 private:
  std::array<std::int16_t, 256> bits_;
};

// The price of each part by the cheapest of the price lists, and which one that is.
std::uint64_t assign(const Parts& parts, const std::vector<Prices>& prices, Groups& groups) {
  std::uint64_t total = 0;
  for (std::size_t p = 0; p < parts.size(); ++p) {
    std::uint64_t best = ~std::uint64_t{0};
    for (std::size_t g = 0; g < prices.size(); ++g) {
      const std::uint64_t cost = prices[g](parts[p]);
      if (cost >= best) continue;
      best = cost;
      groups[p] = static_cast<std::uint8_t>(g);
    }
    total += best;
  }
  return total;
}

std::uint64_t total_price(const Parts& parts, const std::vector<CodeTable>& tables) {
  Groups groups(parts.size());
  std::uint64_t stored = 0;
  for (const auto& table : tables) stored += 8 * table_bytes(table);
  return stored + assign(parts, {tables.begin(), tables.end()}, groups);
}

// Lloyd's algorithm on groups of parts that have the same price under the common table at first.
std::vector<CodeTable> cluster(const Parts& parts, const std::vector<std::uint32_t>& by_price,
                               std::size_t count, const TableRules& rules, const Counts& all) {
  Groups groups(parts.size());
  for (std::size_t i = 0; i < by_price.size(); ++i) {
    groups[by_price[i]] = static_cast<std::uint8_t>(i * count / by_price.size());
  }
  std::vector<CodeTable> tables;
  for (std::size_t round = 0; round < kRounds; ++round) {
    if (round > 0) assign(parts, {tables.begin(), tables.end()}, groups);
    tables.clear();
    for (std::size_t g = 0; g < count; ++g) {
      if (std::find(groups.begin(), groups.end(), g) == groups.end()) continue;
      Counts counts = sum_counts(parts, groups, g);
      // A part may change to a table that was not made for it: every table must hold every value.
      for (std::size_t v = 0; v < 256 && !rules.escapes; ++v) {
        if (counts[v] == 0 && all[v] != 0) counts[v] = 1;
      }
      tables.push_back(build_table(counts, rules.escapes, rules.escapes));
    }
  }
  return tables;
}

}  // namespace

std::vector<CodeTable> choose_tables(const Parts& parts, const TableRules& rules) {
  if (parts.empty()) return {};
  const Counts all = sum_counts(parts, Groups(parts.size()), 0);
  std::vector<CodeTable> best{build_table(all, rules.escapes, rules.always_escape)};
  if (rules.most < 2 || parts.size() < 2) return best;
  const Prices common(best[0]);
  std::vector<std::uint64_t> price(parts.size());  // of a byte, in parts of 1024
  for (std::size_t p = 0; p < parts.size(); ++p) {
    const auto bytes = std::accumulate(parts[p].begin(), parts[p].end(), std::uint64_t{0});
    price[p] = common(parts[p]) * 1024 / bytes;
  }
  const auto [low, high] = std::minmax_element(price.begin(), price.end());
  if (*high - *low <= *high / kSpreadShare) return best;
  std::vector<std::uint32_t> by_price(parts.size());
  std::iota(by_price.begin(), by_price.end(), 0U);
  std::stable_sort(by_price.begin(), by_price.end(),
                   [&](std::uint32_t a, std::uint32_t b) { return price[a] < price[b]; });
  std::uint64_t least = total_price(parts, best);
  for (std::size_t count = 2; count <= std::min(rules.most, parts.size()); count += count) {
    std::vector<CodeTable> more = cluster(parts, by_price, count, rules, all);
    const std::uint64_t total = total_price(parts, more);
    if (total >= least - least / kGainShare) break;
    best = std::move(more);
    least = total;
  }
  return best;
}

TablePicker::TablePicker(const std::vector<CodeTable>& tables) : single_(tables.size() < 2) {
  for (std::size_t t = 0; t < tables.size(); ++t) {
    for (std::size_t v = 0; v < 256; ++v) {
      bits_[v] |= std::uint64_t{Prices::code_bits(tables[t], v)} << (16 * t);
    }
  }
}

std::uint8_t TablePicker::pick(const std::uint8_t* part, std::size_t size,
                               std::size_t step) const {
  if (single_) return 0;
  // Two sums of half a part at most: 2048 times 19 bits stay below 2^16.
  static_assert(kMaxTileBytes / kStreams / 2 * (kMaxCodeBits + 8) < 65536, "sums would overflow");
  std::uint64_t sum[2] = {};
  for (std::size_t at = 0; at < size; at += step * kFractalCols) {
    for (std::size_t i = 0; i < kFractalCols; i += 2) {
      sum[0] += bits_[part[at + i]];
      sum[1] += bits_[part[at + i + 1]];
    }
  }
  std::uint64_t total[kMaxTables];
  for (std::size_t t = 0; t < kMaxTables; ++t) {
    total[t] = (sum[0] >> (16 * t) & 0xFFFF) + (sum[1] >> (16 * t) & 0xFFFF);
  }
  // A table that is not there has a price of zero.
  std::size_t best = 0;
  for (std::size_t t = 1; t < kMaxTables && total[t] != 0; ++t) {
    if (total[t] < total[best]) best = t;
  }
  return static_cast<std::uint8_t>(best);
}

}  // namespace slc1
