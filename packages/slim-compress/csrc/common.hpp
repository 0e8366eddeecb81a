// Constants and small types shared by every part of the slc1 codec.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "slc1 is written for little-endian machines"
#endif

namespace slc1 {

constexpr std::size_t kFractalRows = 16;
constexpr std::size_t kFractalCols = 32;
constexpr std::size_t kFractalBytes = kFractalRows * kFractalCols;
constexpr std::size_t kMaxTileFractals = 8;  // along each axis
constexpr std::size_t kMaxTileBytes = kMaxTileFractals * kMaxTileFractals * kFractalBytes;

constexpr std::size_t kStreams = 8;  // of a tile: each codes one eighth, called a part
constexpr std::size_t kMaxCodeBits = 11;
constexpr std::size_t kEscape = 256;  // symbol that stands for "an escape byte follows"
constexpr std::size_t kSymbols = 257;
constexpr std::size_t kMaxTables = 4;

// Every kernel may write this many bytes past the end of its output.
constexpr std::size_t kWriteSlack = 64;

enum class Mode : std::uint8_t { kRaw = 0, kFill = 1, kNib = 2, kHuf = 3 };

// Why a stream was refused; the text is what the user reads.
struct Verdict {
  const char* reason = nullptr;  // nullptr: accepted
  explicit operator bool() const { return reason == nullptr; }
};

inline std::uint64_t load64(const std::uint8_t* p) {
  std::uint64_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline std::uint16_t load16(const std::uint8_t* p) {
  std::uint16_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline std::uint32_t load32(const std::uint8_t* p) {
  std::uint32_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <typename T>
inline void store(std::uint8_t* p, T v) {
  std::memcpy(p, &v, sizeof v);
}
inline std::size_t ceil_div(std::size_t a, std::size_t b) { return a / b + (a % b != 0); }

}  // namespace slc1
