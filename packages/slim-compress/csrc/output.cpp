#include "output.hpp"

#include <algorithm>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace slc1 {

Buffer allocate(std::size_t size) {
  auto* memory = static_cast<std::uint8_t*>(std::malloc(size));
  if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // A fault for each 4 KiB of fresh memory would cost a tenth of the time of encoding.
  constexpr std::size_t kHugePage = std::size_t{1} << 21;
  if (size >= 2 * kHugePage) {
    const auto start = reinterpret_cast<std::uintptr_t>(memory);
    const std::size_t skip = (kHugePage - start % kHugePage) % kHugePage;
    (void)madvise(memory + skip, (size - skip) / kHugePage * kHugePage, MADV_HUGEPAGE);
  }
#endif
  return {memory, std::free};
}

void Output::put(std::size_t tile, const std::uint8_t* payload, std::size_t length) {
  try {
    place(tile, payload, length);
  } catch (...) {
    const std::lock_guard<std::mutex> lock(mutex_);
    failed_ = true;  // those who wait for this tile would do so for ever
    moved_.notify_all();
    throw;
  }
}

void Output::place(std::size_t tile, const std::uint8_t* payload, std::size_t length) {
  std::vector<Payload> followers;
  std::size_t at = 0;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    moved_.wait(lock, [&] { return tile <= next_ + ahead_ || failed_; });
    if (failed_) return;
    if (tile != next_) {
      waiting_.emplace(tile, Payload(payload, payload + length));
      return;
    }
    at = end_;
    end_ += length;
    ++next_;
    for (auto it = waiting_.begin(); it != waiting_.end() && it->first == next_;
         it = waiting_.erase(it), ++next_) {
      end_ += it->second.size();
      followers.push_back(std::move(it->second));
    }
    moved_.notify_all();
  }
  std::uint8_t* to = bytes_.get() + at;
  std::memcpy(to, payload, length);
  to += length;
  for (const Payload& follower : followers) {
    to = std::copy(follower.begin(), follower.end(), to);
  }
}

Buffer Output::finish(std::size_t guard, std::size_t& size) {
  std::memset(bytes_.get() + end_, 0, guard);
  size = end_ + guard;
  auto* memory = static_cast<std::uint8_t*>(std::realloc(bytes_.get(), size));
  if (memory == nullptr) throw std::bad_alloc();
  (void)bytes_.release();
  return {memory, std::free};
}

}  // namespace slc1
