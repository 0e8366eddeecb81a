// The payloads of a tensor, one behind the other in the order of tiles.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "common.hpp"

namespace slc1 {

using Buffer = std::unique_ptr<std::uint8_t[], void (*)(void*)>;

// Memory from malloc; what is never touched takes address space only. Throws std::bad_alloc.
Buffer allocate(std::size_t size);

// Takes payloads in whatever order threads finish them.
class Output {
 public:
  // `capacity`: the most bytes that all payloads and the guard can have.
  explicit Output(std::size_t capacity) : bytes_(allocate(capacity)) {}

  // Called once for each tile 0, 1, 2, ...; from any thread, in any order.
  void put(std::size_t tile, const std::uint8_t* payload, std::size_t length);

  // Appends `guard` zero bytes and gives the memory away, cut to its size.
  Buffer finish(std::size_t guard, std::size_t& size);

 private:
  using Payload = std::vector<std::uint8_t>;

  Buffer bytes_;
  std::mutex mutex_;
  std::size_t next_ = 0;                    // tile
  std::size_t end_ = 0;                     // of the payloads before it
  std::map<std::size_t, Payload> waiting_;  // finished before an earlier tile was
};

}  // namespace slc1
