// Compressing a matrix to the two arrays of slc1, and back.
#pragma once

#include <memory>
#include <vector>

#include "container.hpp"
#include "kernels.hpp"
#include "output.hpp"

namespace slc1 {

struct EncodeOptions {
  std::size_t threads = 1;
  std::size_t tile_n = kMaxTileFractals;
  std::size_t tile_k = kMaxTileFractals;
  std::size_t max_tables = kMaxTables;
  bool escapes = true;   // false: every value that occurs gets a code (for measurements)
  bool fast = false;     // prefer NIB, which decodes several times faster, to HUF
  std::uint8_t flags = 0;
};

struct Encoded {
  Buffer weight{nullptr, nullptr};
  std::size_t weight_size = 0;
  std::vector<std::uint8_t> index;
};

// Throws std::bad_alloc when memory runs out.
Encoded encode(const View& matrix, std::size_t n, std::size_t k, const EncodeOptions& options);

// Decodes tiles of a container; the weight must have the length that Container::open was given.
class Decoder {
 public:
  Decoder(const Container& container, const std::uint8_t* weight, std::size_t weight_size);

  // Checks the guard that follows the payloads.
  Problem check_guard() const;

  // All tiles to `matrix`; the problem of the lowest tile that has one.
  Problem decode(const View& matrix, std::size_t threads) const;

  // As decode, but keeps nothing.
  Problem check(std::size_t threads) const;

  // `out` needs room for kMaxTileBytes + kWriteSlack.
  Problem decode_tile(std::size_t tile, std::uint8_t* out) const;

 private:
  template <typename Take>
  Problem each_tile(std::size_t threads, Take&& take) const;

  const Container& container_;
  const std::uint8_t* weight_;
  std::size_t weight_size_;
  std::vector<DecodeTable> tables_;
};

}  // namespace slc1
