// Any bytes as a matrix: each instruction set writes the same stream, which decodes to the matrix.
//
// Input: three bytes for shape and options, then the values.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "codec.hpp"

namespace {

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 4) return 0;
  const std::size_t k = 1 + std::size_t{data[0]} * 2;
  slc1::EncodeOptions options;
  options.fast = (data[1] & 1U) != 0;
  options.escapes = (data[1] & 2U) == 0;
  options.max_tables = 1 + (data[1] >> 2 & 3U);
  options.tile_n = 1 + (data[1] >> 4 & 7U);
  options.tile_k = 1 + (data[2] & 7U);
  const std::size_t n = slc1::ceil_div(size - 3, k);
  std::vector<std::uint8_t> matrix(n * k, data[2]);
  std::memcpy(matrix.data(), data + 3, size - 3);
  const slc1::View view{matrix.data(), static_cast<std::ptrdiff_t>(k), 1};
  std::vector<std::uint8_t> weight;
  std::vector<std::uint8_t> index;
  for (const auto* set : slc1::available_kernels()) {
    slc1::use_kernels(set->name);
    const slc1::Encoded encoded = slc1::encode(view, n, k, options);
    std::vector<std::uint8_t> bytes(encoded.weight.get(),
                                    encoded.weight.get() + encoded.weight_size);
    require(weight.empty() || (bytes == weight && encoded.index == index),
            "instruction sets write different streams");
    weight = std::move(bytes);
    index = encoded.index;
    slc1::Container container;
    require(container.open(index.data(), index.size(), weight.size()).reason == nullptr,
            "the encoder's own stream is refused");
    std::vector<std::uint8_t> decoded(n * k);
    const slc1::View out{decoded.data(), static_cast<std::ptrdiff_t>(k), 1};
    require(slc1::Decoder(container, weight.data(), weight.size()).decode(out, 1).reason == nullptr,
            "the encoder's own tiles are refused");
    require(decoded == matrix, "the matrix does not come back");
  }
  return 0;
}
