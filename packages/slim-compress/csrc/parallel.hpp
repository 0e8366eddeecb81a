// Runs a function over 0..count-1 on several threads; which thread takes what never shows.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace slc1 {

// `make_worker()` is called once in each thread and returns a callable of one index.
template <typename MakeWorker>
void parallel_for(std::size_t count, std::size_t threads, MakeWorker&& make_worker) {
  std::atomic<std::size_t> next{0};
  std::exception_ptr failure;
  std::mutex guard;
  auto run = [&] {
    try {
      auto worker = make_worker();
      auto take = [&] { return next.fetch_add(1, std::memory_order_relaxed); };
      for (std::size_t i = take(); i < count; i = take()) worker(i);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(guard);
      if (!failure) failure = std::current_exception();
    }
  };
  const std::size_t wanted = std::min(threads, count);
  std::vector<std::thread> pool;
  pool.reserve(wanted);
  try {
    while (pool.size() + 1 < wanted) pool.emplace_back(run);
  } catch (const std::system_error&) {
    // The system gives no more threads: those that run take the work.
  }
  run();
  for (auto& thread : pool) thread.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace slc1
