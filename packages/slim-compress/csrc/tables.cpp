#include "tables.hpp"

#include <algorithm>
#include <numeric>

namespace slc1 {
namespace {

using Parts = std::vector<const PartCounts*>;

constexpr std::size_t kRounds = 3;  // of assigning parts to tables and building the tables anew

// More tables are tried if the cost of parts under a common one spreads by a sixteenth, and taken
// if they save a thousandth: several tables share the first-level cache less well.
constexpr std::uint64_t kSpreadShare = 16;
constexpr std::uint64_t kGainShare = 1024;

Counts sum_counts(const Parts& parts, const std::vector<std::uint8_t>& group, std::size_t wanted) {
  Counts total{};
  for (std::size_t p = 0; p < parts.size(); ++p) {
    if (group[p] != wanted) continue;
    for (std::size_t v = 0; v < 256; ++v) total[v] += (*parts[p])[v];
  }
  // A code needs two values: one that never comes stands in for the second.
  if (std::count(total.begin(), total.end(), 0U) == 255) {
    *std::find(total.begin(), total.end(), 0U) = 1;
  }
  return total;
}

// What a value costs under a table, in 16 bits so that sums of products become vector code.
class Prices {
 public:
  explicit Prices(const CodeTable& table) : complete_(table.has_escape()) {
    const int escape = table.lengths[kEscape] + 8;
    for (std::size_t v = 0; v < 256; ++v) {
      const int length = table.lengths[v];
      bits_[v] = static_cast<std::int16_t>(length != 0 ? length : escape);
      missing_[v] = length == 0;
    }
  }

  // Bits of a part: codes, and 8 for each escape byte. Huge if the table lacks a value.
  std::uint64_t operator()(const PartCounts& counts) const {
    constexpr std::uint64_t kImpossible = std::uint64_t{1} << 32;
    if (!complete_ && dot(missing_, counts) != 0) return kImpossible;
    return static_cast<std::uint64_t>(dot(bits_, counts));
  }

 private:
  using Values = std::array<std::int16_t, 256>;

  static std::int32_t dot(const Values& values, const PartCounts& counts) {
    std::int32_t sum = 0;
    for (std::size_t v = 0; v < 256; ++v) sum += values[v] * static_cast<std::int16_t>(counts[v]);
    return sum;
  }

  Values bits_;
  Values missing_;
  bool complete_;
};

// Bits a byte, in 1/1024, of each part under one table.
std::vector<std::uint64_t> density(const Parts& parts, const Prices& price) {
  std::vector<std::uint64_t> bits(parts.size());
  for (std::size_t p = 0; p < parts.size(); ++p) {
    const auto bytes = std::accumulate(parts[p]->begin(), parts[p]->end(), std::uint64_t{0});
    bits[p] = price(*parts[p]) * 1024 / bytes;
  }
  return bits;
}

// Each part to its cheapest table.
void assign(const Parts& parts, TableChoice& choice) {
  const std::vector<Prices> prices(choice.tables.begin(), choice.tables.end());
  choice.table_of.resize(parts.size());
  for (std::size_t p = 0; p < parts.size(); ++p) {
    std::uint64_t best = ~std::uint64_t{0};
    for (std::size_t g = 0; g < prices.size(); ++g) {
      const std::uint64_t cost = prices[g](*parts[p]);
      if (cost >= best) continue;
      best = cost;
      choice.table_of[p] = static_cast<std::uint8_t>(g);
    }
  }
}

// Starts from parts sorted by how much they cost under the common table, then improves as Lloyd's
// algorithm does: a table for each group, each part to its cheapest table.
TableChoice cluster(const Parts& parts, const std::vector<std::uint64_t>& bits, std::size_t groups,
                    const TableRules& rules) {
  std::vector<std::uint32_t> order(parts.size());
  std::iota(order.begin(), order.end(), 0U);
  std::stable_sort(order.begin(), order.end(),
                   [&](std::uint32_t a, std::uint32_t b) { return bits[a] < bits[b]; });
  TableChoice choice;
  choice.table_of.resize(parts.size());
  for (std::size_t i = 0; i < order.size(); ++i) {
    choice.table_of[order[i]] = static_cast<std::uint8_t>(i * groups / order.size());
  }
  for (std::size_t round = 0; round < kRounds; ++round) {
    choice.tables.clear();
    for (std::size_t g = 0; g < groups; ++g) {
      const auto& of = choice.table_of;
      if (std::find(of.begin(), of.end(), g) == of.end()) continue;
      choice.tables.push_back(
          build_table(sum_counts(parts, of, g), rules.escapes, rules.always_escape));
    }
    assign(parts, choice);
  }
  return choice;
}

// A thousand parts show the groups as well as a hundred thousand. Tables that hold any value are
// needed for that: those of a group may lack values of parts that were left out.
constexpr std::size_t kEnoughParts = 1024;

Parts thin_out(const Parts& parts, bool always_escape) {
  const std::size_t step = always_escape ? parts.size() / kEnoughParts + 1 : 1;
  Parts some;
  for (std::size_t p = 0; p < parts.size(); p += step) some.push_back(parts[p]);
  return some;
}

std::uint64_t total_bits(const Parts& parts, const TableChoice& choice) {
  std::uint64_t bits = 0;
  for (const auto& table : choice.tables) bits += 8 * table_bytes(table);
  const std::vector<Prices> prices(choice.tables.begin(), choice.tables.end());
  for (std::size_t p = 0; p < parts.size(); ++p) bits += prices[choice.table_of[p]](*parts[p]);
  return bits;
}

}  // namespace

TableChoice choose_tables(const Parts& parts, const TableRules& rules) {
  TableChoice one;
  one.table_of.assign(parts.size(), 0);
  if (parts.empty()) return one;
  one.tables.push_back(build_table(sum_counts(parts, one.table_of, 0), rules.escapes,
                                   rules.always_escape));
  const std::size_t groups = std::min(rules.most, parts.size());
  if (groups < 2) return one;
  const Parts some = thin_out(parts, rules.always_escape);
  const auto bits = density(some, Prices(one.tables[0]));
  const auto [low, high] = std::minmax_element(bits.begin(), bits.end());
  if (*high - *low <= *high / kSpreadShare) return one;
  const std::uint64_t cost = total_bits(parts, one);
  TableChoice best = std::move(one);
  std::uint64_t least = cost - cost / kGainShare;
  for (std::size_t g = 2; g <= groups; g += g) {
    TableChoice many = cluster(some, bits, std::min(g, some.size()), rules);
    assign(parts, many);
    const std::uint64_t bits_of_many = total_bits(parts, many);
    if (bits_of_many >= least) break;
    best = std::move(many);
    least = bits_of_many - bits_of_many / kGainShare;
  }
  return best;
}

}  // namespace slc1
