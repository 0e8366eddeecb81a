#include "huffman.hpp"

#include <algorithm>
#include <numeric>
#include <vector>

namespace slc1 {
namespace {

constexpr std::uint64_t kFull = std::uint64_t{1} << kMaxCodeBits;

// Package-merge (Larmore and Hirschberg 1990). `weights` ascend; lengths come back in that order.
std::vector<std::uint8_t> package_merge(const std::vector<std::uint64_t>& weights) {
  const std::size_t n = weights.size();
  struct Item {
    std::uint64_t weight;
    int left;   // leaf: -1
    int right;  // leaf: its index
  };
  std::vector<Item> pool;
  pool.reserve(n * (2 * kMaxCodeBits + 2));
  std::vector<int> leaves(n);
  for (std::size_t i = 0; i < n; ++i) {
    leaves[i] = static_cast<int>(pool.size());
    pool.push_back({weights[i], -1, static_cast<int>(i)});
  }
  std::vector<int> list = leaves;
  std::vector<int> packages;
  std::vector<int> merged;
  for (std::size_t level = 1; level < kMaxCodeBits; ++level) {
    packages.clear();
    for (std::size_t i = 0; i + 1 < list.size(); i += 2) {
      packages.push_back(static_cast<int>(pool.size()));
      pool.push_back({pool[list[i]].weight + pool[list[i + 1]].weight, list[i], list[i + 1]});
    }
    merged.clear();
    // On equal weight a leaf goes before a package: the same lengths on every machine.
    std::merge(leaves.begin(), leaves.end(), packages.begin(), packages.end(),
               std::back_inserter(merged),
               [&](int a, int b) { return pool[a].weight < pool[b].weight; });
    list.swap(merged);
  }
  std::vector<std::uint8_t> lengths(n, 0);
  std::vector<int> stack(list.begin(), list.begin() + static_cast<std::ptrdiff_t>(2 * n - 2));
  while (!stack.empty()) {
    const Item item = pool[stack.back()];
    stack.pop_back();
    if (item.left < 0) {
      ++lengths[item.right];
    } else {
      stack.push_back(item.left);
      stack.push_back(item.right);
    }
  }
  return lengths;
}

struct Candidate {
  std::uint64_t cost = ~std::uint64_t{0};
  CodeTable table;
};

// `order`: values that occur, most frequent first. The first `direct` of them get codes.
Candidate try_direct(const Counts& counts, const std::vector<int>& order, std::size_t direct,
                     bool always_escape) {
  std::uint64_t tail = always_escape && order.size() < 256 ? 1 : 0;
  for (std::size_t i = direct; i < order.size(); ++i) tail += counts[order[i]];
  std::vector<int> symbols(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(direct));
  if (tail != 0) symbols.push_back(static_cast<int>(kEscape));
  Candidate result;
  if (symbols.size() < 2) return result;
  auto weight = [&](int s) { return s == static_cast<int>(kEscape) ? tail : counts[s]; };
  std::sort(symbols.begin(), symbols.end(),
            [&](int a, int b) { return std::make_pair(weight(a), a) < std::make_pair(weight(b), b); });
  std::vector<std::uint64_t> weights(symbols.size());
  std::transform(symbols.begin(), symbols.end(), weights.begin(), weight);
  const auto lengths = package_merge(weights);
  result.cost = 8 * tail;
  for (std::size_t i = 0; i < symbols.size(); ++i) {
    result.table.lengths[symbols[i]] = lengths[i];
    result.cost += lengths[i] * weights[i];
  }
  if (tail != 0) {
    std::uint8_t absent = 0;
    while (result.table.lengths[absent] != 0) ++absent;
    result.table.placeholder = absent;
  }
  return result;
}

}  // namespace

CodeTable build_table(const Counts& counts, bool escapes, bool always_escape) {
  std::vector<int> order;
  for (int v = 0; v < 256; ++v) {
    if (counts[v] != 0) order.push_back(v);
  }
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return counts[a] > counts[b]; });
  if (!escapes) return try_direct(counts, order, order.size(), false).table;
  Candidate best;
  auto consider = [&](std::size_t direct) {
    if (direct < 1 || direct > order.size()) return;
    Candidate next = try_direct(counts, order, direct, always_escape);
    if (next.cost < best.cost) best = std::move(next);
  };
  // The cost over the number of direct values has one valley in practice: coarse, then fine.
  const std::size_t step = order.size() <= 32 ? 1 : 8;
  std::size_t centre = order.size();
  std::uint64_t before = best.cost;
  for (std::size_t direct = order.size();; direct -= std::min(step, direct)) {
    consider(direct);
    if (best.cost < before) centre = direct;
    before = best.cost;
    if (direct <= step) break;
  }
  for (std::size_t d = 1; step > 1 && d < step; ++d) {
    consider(centre + d);
    consider(centre > d ? centre - d : 0);
  }
  return best.table;
}

Codes canonical_codes(const Lengths& lengths) {
  std::array<std::uint32_t, kMaxCodeBits + 1> used{};
  for (const auto length : lengths) ++used[length];
  used[0] = 0;
  std::array<std::uint32_t, kMaxCodeBits + 1> next{};
  for (std::size_t l = 1; l <= kMaxCodeBits; ++l) next[l] = (next[l - 1] + used[l - 1]) << 1;
  Codes codes{};
  for (std::size_t s = 0; s < kSymbols; ++s) {
    const std::size_t length = lengths[s];
    if (length == 0) continue;
    const std::uint32_t code = next[length]++;
    std::uint32_t reversed = 0;
    for (std::size_t b = 0; b < length; ++b) reversed |= ((code >> b) & 1U) << (length - 1 - b);
    codes[s] = static_cast<std::uint16_t>(reversed);
  }
  return codes;
}

namespace {

// The least and the greatest value that have a code, as signed numbers.
struct Range {
  int first = 127;
  int last = -128;
  explicit Range(const Lengths& lengths) {
    for (int v = -128; v < 128; ++v) {
      if (lengths[v & 255] == 0) continue;
      first = std::min(first, v);
      last = v;
    }
  }
};

std::size_t range_bytes(int first, int last) {
  return 4 + (static_cast<std::size_t>(last - first) + 2) / 2;
}

}  // namespace

std::size_t table_bytes(const CodeTable& table) {
  const Range range(table.lengths);
  return range_bytes(range.first, range.last);
}

void write_table(const CodeTable& table, std::uint8_t* out) {
  const Range range(table.lengths);
  std::memset(out, 0, table_bytes(table));
  out[0] = static_cast<std::uint8_t>(range.first);
  out[1] = static_cast<std::uint8_t>(range.last);
  out[2] = table.placeholder;
  out[3] = table.lengths[kEscape];
  for (int v = range.first; v <= range.last; ++v) {
    const int i = v - range.first;
    out[4 + i / 2] |= static_cast<std::uint8_t>(table.lengths[v & 255] << (4 * (i % 2)));
  }
}

Verdict read_table(const std::uint8_t* in, std::size_t available, CodeTable& table) {
  if (available < 4) return {"the index is too short for its tables"};
  const int first = static_cast<std::int8_t>(in[0]);
  const int last = static_cast<std::int8_t>(in[1]);
  if (first > last) return {"a table ends before its first value"};
  if (available < range_bytes(first, last)) return {"the index is too short for its tables"};
  table.lengths.fill(0);
  table.lengths[kEscape] = in[3];
  for (int v = first; v <= last; ++v) {
    const int i = v - first;
    table.lengths[v & 255] = static_cast<std::uint8_t>((in[4 + i / 2] >> (4 * (i % 2))) & 15);
  }
  const int odd = last - first + 1;
  if (odd % 2 != 0 && in[4 + odd / 2] >> 4 != 0) return {"non-zero padding in a table"};
  std::uint64_t kraft = 0;
  for (const auto length : table.lengths) {
    if (length > kMaxCodeBits) return {"a code of a table is longer than 11 bits"};
    if (length != 0) kraft += kFull >> length;
  }
  if (kraft != kFull) return {"the code lengths of a table do not form a complete prefix code"};
  if (table.lengths[first & 255] == 0 || table.lengths[last & 255] == 0) {
    return {"a table goes on beyond its last value"};
  }
  table.placeholder = in[2];
  std::size_t absent = 0;
  while (absent < 256 && table.lengths[absent] != 0) ++absent;
  if (table.has_escape() ? absent != in[2] : in[2] != 0) {
    return {"a table has a wrong placeholder value"};
  }
  return {};
}

void build_decode_table(const CodeTable& table, DecodeTable& out) {
  const Codes codes = canonical_codes(table.lengths);
  std::array<std::uint16_t, kFull> single{};  // value | length << 8
  out.length_of.fill(0);
  for (std::size_t s = 0; s < kSymbols; ++s) {
    const std::size_t length = table.lengths[s];
    if (length == 0) continue;
    const std::size_t value = s == kEscape ? table.placeholder : s;
    out.length_of[value] = static_cast<std::uint8_t>(length);
    for (std::size_t i = codes[s]; i < kFull; i += std::size_t{1} << length) {
      single[i] = static_cast<std::uint16_t>(value | length << 8);
    }
  }
  for (std::size_t i = 0; i < kFull; ++i) {
    std::uint64_t row = 0;
    std::size_t used = 0;
    std::size_t count = 0;
    while (count < 6) {
      const std::uint16_t next = single[i >> used];
      const std::size_t length = next >> 8;
      if (used + length > kMaxCodeBits) break;
      row |= std::uint64_t{next & 255U} << (56 - 8 * count);
      used += length;
      ++count;
    }
    out.rows[i] = row | count << 8 | used;
  }
  out.placeholder = table.placeholder;
  out.has_escape = table.has_escape();
}

void build_encode_table(const CodeTable& table, bool with_pairs, EncodeTable& out) {
  const Codes codes = canonical_codes(table.lengths);
  out.any_escaped = false;
  for (std::size_t v = 0; v < 256; ++v) {
    const std::size_t s = table.lengths[v] != 0 ? v : kEscape;
    out.escaped[v] = s == kEscape;
    out.any_escaped |= s == kEscape;
    out.code[v] = codes[s] | static_cast<std::uint32_t>(table.lengths[s]) << 24;
  }
  out.pair.resize(with_pairs ? 65536 : 0);
  for (std::size_t i = 0; i < out.pair.size(); ++i) {
    const std::uint32_t first = out.code[i >> 8];
    const std::uint32_t second = out.code[i & 255];
    out.pair[i] = first + ((second & 0xFFFF) << (first >> 24)) + (second & 0xFF000000U);
  }
}

}  // namespace slc1
