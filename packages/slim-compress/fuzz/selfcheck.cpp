// Streams of a fixed set of matrices, their checksums printed: the output must be the same for each
// instruction set and on every machine. Needs no fuzzer, so it also runs in an emulator.
//
// selfcheck [STEM...]: STEM.index and STEM.weight are decoded to STEM.matrix, and encoded again.
#include <cstdio>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "codec.hpp"

namespace {

std::vector<std::uint8_t> make_matrix(std::size_t size, unsigned kind) {
  std::mt19937 random(kind);  // specified bit by bit by the standard, unlike the distributions
  std::vector<std::uint8_t> values(size);
  for (auto& v : values) {
    const std::uint32_t r = random();
    int sum = 0;
    for (unsigned b = 0; b < 4; ++b) sum += static_cast<int>(r >> (8 * b) & 15U) - 7;
    if (kind == 1 && r >> 24 == 7) sum = static_cast<int>(r >> 8 & 255U);
    if (kind == 2) sum = static_cast<int>(r & 255U);
    if (kind == 3) sum = 9;
    v = static_cast<std::uint8_t>(kind == 4 ? sum / 4 : sum);
  }
  return values;
}

std::uint32_t checksum(const std::uint8_t* data, std::size_t size) {
  return slc1::kernels().crc32c(data, size);
}

bool check(std::size_t n, std::size_t k, unsigned kind, bool fast) {
  const std::vector<std::uint8_t> matrix = make_matrix(n * k, kind);
  const slc1::View view{const_cast<std::uint8_t*>(matrix.data()), static_cast<std::ptrdiff_t>(k), 1};
  slc1::EncodeOptions options;
  options.fast = fast;
  options.threads = 2;
  const slc1::Encoded e = slc1::encode(view, n, k, options);
  std::printf(" %08x%08x", checksum(e.weight.get(), e.weight_size),
              checksum(e.index.data(), e.index.size()));
  slc1::Container container;
  if (container.open(e.index.data(), e.index.size(), e.weight_size).reason != nullptr) return false;
  std::vector<std::uint8_t> decoded(n * k);
  const slc1::View out{decoded.data(), static_cast<std::ptrdiff_t>(k), 1};
  const slc1::Decoder decoder(container, e.weight.get(), e.weight_size);
  return decoder.decode(out, 2).reason == nullptr && decoded == matrix;
}

using Bytes = std::vector<std::uint8_t>;

Bytes read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return Bytes(std::istreambuf_iterator<char>(file), {});
}

// Each instruction set decodes the stream, and encodes the matrix to the same bytes again.
bool check_file(const std::string& stem) {
  const Bytes index = read(stem + ".index");
  const Bytes weight = read(stem + ".weight");
  slc1::Container container;
  if (container.open(index.data(), index.size(), weight.size()).reason != nullptr) return false;
  const std::size_t n = container.header().n;
  const std::size_t k = container.header().k;
  Bytes matrix(n * k);
  const slc1::View view{matrix.data(), static_cast<std::ptrdiff_t>(k), 1};
  const slc1::Decoder decoder(container, weight.data(), weight.size());
  if (decoder.decode(view, 2).reason != nullptr) return false;
  std::ofstream(stem + ".matrix", std::ios::binary)
      .write(reinterpret_cast<const char*>(matrix.data()), static_cast<std::streamsize>(n * k));
  bool same = false;
  for (const bool fast : {false, true}) {
    slc1::EncodeOptions options;
    options.fast = fast;
    options.flags = container.header().flags;
    const slc1::Encoded again = slc1::encode(view, n, k, options);
    same |= again.index == index &&
            Bytes(again.weight.get(), again.weight.get() + again.weight_size) == weight;
  }
  return same;
}

}  // namespace

int main(int count, char** arguments) {
  bool good = true;
  for (const auto* set : slc1::available_kernels()) {
    slc1::use_kernels(set->name);
    std::printf("%s:", set->name);
    for (unsigned kind = 0; kind < 5; ++kind) {
      for (const bool fast : {false, true}) {
        good &= check(300, 700, kind, fast);
        good &= check(17, 33, kind, fast);
        good &= check(1024, 1100, kind, fast);
      }
    }
    for (int i = 1; i < count; ++i) good &= check_file(arguments[i]);
    std::printf(" %s\n", good ? "good" : "BAD");
  }
  return good ? 0 : 1;
}
