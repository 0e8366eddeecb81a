// Any bytes as a compressed weight: refused or decoded, the same by each instruction set, and never
// a read or write outside the buffers (ASan watches exact copies of them).
//
// Input: u16 length of the index, a control byte, the index, the weight. With bit 0 of the control
// byte the checksum of the index is made right first, or nothing behind it would ever be reached.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "codec.hpp"

namespace {

using slc1::Container;
using slc1::Decoder;
using slc1::Problem;

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

void fix_checksum(std::vector<std::uint8_t>& index) {
  if (index.size() < slc1::kHeaderBytes) return;
  slc1::store(index.data() + slc1::kCrcAt, std::uint32_t{0});
  slc1::store(index.data() + slc1::kCrcAt, slc1::kernels().crc32c(index.data(), index.size()));
}

struct Outcome {
  std::int64_t tile;
  const char* reason;
  std::vector<std::uint8_t> matrix;
};

Outcome open(Container& container, const std::vector<std::uint8_t>& index, std::size_t weight) {
  const Problem p = container.open(index.data(), index.size(), weight);
  return {p.tile, p.reason, {}};
}

Outcome decode(const Container& container, const Decoder& decoder) {
  const std::size_t n = container.header().n;
  const std::size_t k = container.header().k;
  // Exact, and at a line of memory where k allows the writing of whole lines.
  constexpr std::size_t kLine = 64;
  const std::size_t align = k % kLine == 0 ? kLine : 1;
  std::unique_ptr<std::uint8_t, void (*)(void*)> matrix(
      static_cast<std::uint8_t*>(align == 1 ? std::malloc(n * k) : std::aligned_alloc(align, n * k)),
      std::free);
  const slc1::View view{matrix.get(), static_cast<std::ptrdiff_t>(k), 1};
  const Problem p = decoder.decode(view, 1);
  if (p.reason != nullptr) return {p.tile, p.reason, {}};
  return {p.tile, nullptr, {matrix.get(), matrix.get() + n * k}};
}

void compare(const Outcome& a, const Outcome& b) {
  require(a.tile == b.tile, "instruction sets name different tiles");
  require((a.reason == nullptr) == (b.reason == nullptr), "one set accepts, one not");
  require(a.matrix == b.matrix, "instruction sets decode different bytes");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 3) return 0;
  const std::size_t length = std::min<std::size_t>(slc1::load16(data), size - 3);
  std::vector<std::uint8_t> index(data + 3, data + 3 + length);
  const std::vector<std::uint8_t> weight(data + 3 + length, data + size);
  if ((data[2] & 1U) != 0) fix_checksum(index);
  const auto& sets = slc1::available_kernels();
  slc1::use_kernels(sets[0]->name);
  Container container;
  const Outcome opened = open(container, index, weight.size());
  for (const auto* set : sets) {
    slc1::use_kernels(set->name);
    Container again;
    compare(opened, open(again, index, weight.size()));
  }
  if (opened.reason != nullptr) return 0;
  constexpr std::size_t kLimit = std::size_t{1} << 22;  // a constant matrix may honestly be huge
  if (std::size_t{container.header().n} * container.header().k > kLimit) return 0;
  const Decoder decoder(container, weight.data(), weight.size());
  slc1::use_kernels(sets[0]->name);
  const Outcome expected = decode(container, decoder);
  for (std::size_t s = 1; s < sets.size(); ++s) {
    slc1::use_kernels(sets[s]->name);
    compare(expected, decode(container, decoder));
  }
  return 0;
}
