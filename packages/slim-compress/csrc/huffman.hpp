// Length-limited canonical Huffman codes with an escape symbol.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "common.hpp"

namespace slc1 {

using Lengths = std::array<std::uint8_t, kSymbols>;        // 0: the symbol has no code
using Counts = std::array<std::uint64_t, 256>;             // of byte values
using Codes = std::array<std::uint16_t, kSymbols>;         // first bit of the code in bit 0

struct CodeTable {
  Lengths lengths{};
  std::uint8_t placeholder = 0;  // what the decoder emits for an escape
  bool has_escape() const { return lengths[kEscape] != 0; }
};

// The cheapest table for these counts: which values get a code of their own, which are escaped.
// At least two values must occur. Without `escapes` each value that occurs gets a code; with
// `always_escape` the table also holds values that do not occur.
CodeTable build_table(const Counts& counts, bool escapes, bool always_escape);

Codes canonical_codes(const Lengths& lengths);

// The stored form: 4 bytes, and half a byte for each value between the extremes that have a code.
std::size_t table_bytes(const CodeTable& table);
void write_table(const CodeTable& table, std::uint8_t* out);
Verdict read_table(const std::uint8_t* in, std::size_t available, CodeTable& table);

// One row for each 11-bit window. Byte 7 is the first symbol, byte 6 the second, and so on, so that
// a decoder which fills its output from the end stores the whole row with one write; byte 1 is the
// number of symbols (1..6), byte 0 the number of bits they take.
struct DecodeTable {
  std::array<std::uint64_t, std::size_t{1} << kMaxCodeBits> rows;
  std::array<std::uint8_t, 256> length_of;  // of the placeholder: length of the escape code
  std::uint8_t placeholder;
  bool has_escape;
};
void build_decode_table(const CodeTable& table, DecodeTable& out);

// Values that are written as escapes.
struct EscapeSet {
  std::array<std::uint8_t, 256> has;  // 1: is one
  // None of the values first, ..., first + span (modulo 256) is one: a quick test for most bytes.
  std::uint8_t first = 0, span = 0;
  bool empty;

  template <typename Has>
  explicit EscapeSet(Has&& is_escape) {
    std::size_t run = 0;
    std::size_t longest = 0;
    // Twice around, for runs that go on from 255 to 0.
    for (std::size_t v = 0; v < 512 && run < 256; ++v) {
      has[v & 255] = is_escape(v & 255);
      run = has[v & 255] != 0 ? 0 : run + 1;
      if (run <= longest) continue;
      longest = run;
      first = static_cast<std::uint8_t>(v + 1 - run);
      span = static_cast<std::uint8_t>(run - 1);
    }
    empty = longest == 256;
  }
};

// Codes as the encoder joins them: in the highest bits, with the first bit in the lowest of those;
// the length in the lowest eight bits; zeros between.
struct EncodeTable {
  std::array<std::uint64_t, 256> code;
  EscapeSet escapes;
  // Of two neighbours p[0], p[1] at p[0] | p[1] << 8: the code of p[1], then that of p[0], as
  // streams start at the last byte. Empty unless wanted.
  std::vector<std::uint64_t> pair;

  EncodeTable(const CodeTable& table, bool with_pairs);
};

}  // namespace slc1
