#include "huffman.hpp"

#include <algorithm>

namespace slc1 {

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

constexpr std::uint64_t kFull = std::uint64_t{1} << kMaxCodeBits;

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

EncodeTable::EncodeTable(const CodeTable& table, bool with_pairs)
    : escapes([&](std::size_t v) { return table.lengths[v] == 0; }) {
  const Codes codes = canonical_codes(table.lengths);
  for (std::size_t v = 0; v < 256; ++v) {
    const std::size_t s = table.lengths[v] != 0 ? v : kEscape;
    const unsigned length = table.lengths[s];  // 0, of no code: the value does not occur
    code[v] = std::uint64_t{codes[s]} << ((64 - length) & 63) | length;
  }
  if (!with_pairs) return;
  pair.resize(65536);
  for (std::size_t i = 0; i < pair.size(); ++i) {
    const std::uint64_t second = code[i & 255];
    const std::uint64_t length = code[i >> 8] & 255;
    pair[i] = ((code[i >> 8] - length) >> (second & 63)) + second + length;
  }
}

}  // namespace slc1
