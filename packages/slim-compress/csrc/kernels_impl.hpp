// Bodies of the kernels. Included once by each kernels_<isa>.cpp, which is compiled with the flags
// of that instruction set; everything here has internal linkage so that no copy leaks into another.
#pragma once

#include "kernels.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#if defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#endif
#endif

namespace slc1 {
namespace {

#include "kernel_crc32c.inc"
#include "kernel_escapes.inc"
#include "kernel_huf_decode.inc"
#include "kernel_huf_encode.inc"
#include "kernel_nib.inc"

void histogram(const std::uint8_t* bytes, std::size_t size, std::uint16_t* counts) {
  // Four sub-tables: neighbours of equal value would otherwise wait for one another's increment.
  std::uint16_t part[4][256] = {};
  std::size_t i = 0;
  for (; i + 8 <= size; i += 8) {
    const std::uint64_t v = load64(bytes + i);
    ++part[0][v & 255];
    ++part[1][v >> 8 & 255];
    ++part[2][v >> 16 & 255];
    ++part[3][v >> 24 & 255];
    ++part[0][v >> 32 & 255];
    ++part[1][v >> 40 & 255];
    ++part[2][v >> 48 & 255];
    ++part[3][v >> 56];
  }
  for (; i < size; ++i) ++part[0][bytes[i]];
  for (std::size_t v = 0; v < 256; ++v) {
    counts[v] = static_cast<std::uint16_t>(counts[v] + part[0][v] + part[1][v] + part[2][v] +
                                           part[3][v]);
  }
}

constexpr Kernels make_kernels(const char* name) {
  return {name, crc32c, histogram, encode_part, collect_escapes, huf_decode, nib_encode, nib_decode};
}

}  // namespace
}  // namespace slc1
