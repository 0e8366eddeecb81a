// The hot loops, one set for each instruction set, all with identical results.
#pragma once

#include <string>
#include <vector>

#include "huffman.hpp"

namespace slc1 {

struct Kernels {
  const char* name;

  // CRC-32C (Castagnoli, reflected, initial and final complement as in RFC 3720) of the bytes.
  std::uint32_t (*crc32c)(const std::uint8_t* data, std::size_t size);

  // Adds the byte values of 65535 bytes at most to `counts`.
  void (*histogram)(const std::uint8_t* bytes, std::size_t size, std::uint16_t* counts);

  // Writes the bit stream of a part; returns its end, or nullptr if that lies past `limit`. Up to
  // kWriteSlack bytes past the end or the limit are touched. The part has 8 bytes or a multiple.
  std::uint8_t* (*encode_part)(const EncodeTable& table, const std::uint8_t* part, std::size_t size,
                               std::uint8_t* out, const std::uint8_t* limit);

  // Writes the bytes that are escapes in their order; returns the end of what it wrote, or nullptr
  // as above. Reads up to kWriteSlack bytes behind the part.
  std::uint8_t* (*collect_escapes)(const EscapeSet& escapes, const std::uint8_t* part,
                                   std::size_t size, std::uint8_t* out, const std::uint8_t* limit);

  // `tile` must have room for kMaxTileBytes + kWriteSlack bytes. Reads stay below `readable_end`.
  Verdict (*huf_decode)(const DecodeTable* tables, std::size_t table_count,
                        const std::uint8_t* payload, std::size_t length,
                        const std::uint8_t* readable_end, std::uint8_t* tile, std::size_t size);

  // Returns the end of the payload, or nullptr as above.
  std::uint8_t* (*nib_encode)(const std::uint8_t* tile, std::size_t size, std::uint8_t* out,
                              const std::uint8_t* limit);
  Verdict (*nib_decode)(const std::uint8_t* payload, std::size_t length,
                        const std::uint8_t* readable_end, std::uint8_t* tile, std::size_t size);
};

// The sets that this machine can run, slowest first; the last one is the default.
const std::vector<const Kernels*>& available_kernels();

// The set in use: the fastest, or the one named by SLIM_COMPRESS_ISA or chosen with use_kernels.
const Kernels& kernels();

// Returns false if there is no such set here.
bool use_kernels(const std::string& name);

}  // namespace slc1
