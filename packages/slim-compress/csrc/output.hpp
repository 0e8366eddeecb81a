// The payloads of a tensor, one behind the other in the order of tiles.
#pragma once

#include <condition_variable>
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
  // `capacity`: the most bytes that all payloads and the guard can have. `ahead`: how many payloads
  // may wait for one before them, which a thread may be slow to finish.
  Output(std::size_t capacity, std::size_t ahead) : bytes_(allocate(capacity)), ahead_(ahead) {}

  // Called once for each tile 0, 1, 2, ...; from any thread, in any order, but no thread may go on
  // to a lower tile. Waits while the tile is too far ahead. After an exception nothing is kept.
  void put(std::size_t tile, const std::uint8_t* payload, std::size_t length);

  // Appends `guard` zero bytes and gives the memory away, cut to its size.
  Buffer finish(std::size_t guard, std::size_t& size);

 private:
  using Payload = std::vector<std::uint8_t>;

  void place(std::size_t tile, const std::uint8_t* payload, std::size_t length);

  Buffer bytes_;
  std::size_t ahead_;
  std::mutex mutex_;
  std::condition_variable moved_;
  bool failed_ = false;
  std::size_t next_ = 0;                    // tile
  std::size_t end_ = 0;                     // of the payloads before it
  std::map<std::size_t, Payload> waiting_;  // finished before an earlier tile was
};

}  // namespace slc1
