// The choice of a code for given counts.
#include <algorithm>

#include "huffman.hpp"

namespace slc1 {
namespace {

// Package-merge (Larmore and Hirschberg 1990). `weights` ascend; lengths come back in that order.
std::vector<std::uint8_t> package_merge(const std::vector<std::uint64_t>& weights) {
  const std::size_t n = weights.size();
  struct Item {
    std::uint64_t weight;
    int left;   // leaf: -1
    int right;  // leaf: its index
  };
  std::vector<Item> pool;
  pool.reserve(n * (2 * kMaxCodeBits + 2));
  std::vector<int> leaves(n);
  for (std::size_t i = 0; i < n; ++i) {
    leaves[i] = static_cast<int>(pool.size());
    pool.push_back({weights[i], -1, static_cast<int>(i)});
  }
  std::vector<int> list = leaves;
  std::vector<int> packages;
  std::vector<int> merged;
  for (std::size_t level = 1; level < kMaxCodeBits; ++level) {
    packages.clear();
    for (std::size_t i = 0; i + 1 < list.size(); i += 2) {
      packages.push_back(static_cast<int>(pool.size()));
      pool.push_back({pool[list[i]].weight + pool[list[i + 1]].weight, list[i], list[i + 1]});
    }
    merged.clear();
    // On equal weight a leaf goes before a package: the same lengths on every machine.
    std::merge(leaves.begin(), leaves.end(), packages.begin(), packages.end(),
               std::back_inserter(merged),
               [&](int a, int b) { return pool[a].weight < pool[b].weight; });
    list.swap(merged);
  }
  std::vector<std::uint8_t> lengths(n, 0);
  std::vector<int> stack(list.begin(), list.begin() + static_cast<std::ptrdiff_t>(2 * n - 2));
  while (!stack.empty()) {
    const Item item = pool[stack.back()];
    stack.pop_back();
    if (item.left < 0) {
      ++lengths[item.right];
    } else {
      stack.push_back(item.left);
      stack.push_back(item.right);
    }
  }
  return lengths;
}

// Values that occur, most frequent first, and which of them get codes.
class Alphabet {
 public:
  Alphabet(const Counts& counts, bool always_escape) : counts_(counts) {
    for (int v = 0; v < 256; ++v) {
      if (counts[v] != 0) order_.push_back(v);
    }
    std::stable_sort(order_.begin(), order_.end(),
                     [&](int a, int b) { return counts[a] > counts[b]; });
    least_tail_ = always_escape && order_.size() < 256 ? 1 : 0;
    tail_.assign(order_.size() + 1, least_tail_);
    for (std::size_t i = order_.size(); i-- > 0;) tail_[i] = tail_[i + 1] + counts[order_[i]];
    for (std::size_t i = 0; i < order_.size(); ++i) {
      const int value = static_cast<std::int8_t>(order_[i]);
      least_.push_back(i == 0 ? value : std::min(least_.back(), value));
      greatest_.push_back(i == 0 ? value : std::max(greatest_.back(), value));
    }
  }

  std::size_t size() const { return order_.size(); }

  // Bits of all codes, escape bytes and the stored table if the first `direct` values have codes:
  // by a Huffman code that knows the limit of length only roughly, but is quickly made.
  std::uint64_t cost(std::size_t direct) {
    const std::uint64_t tail = tail_[direct];
    if (direct + (tail != 0) < 2) return ~std::uint64_t{0};
    weights_.clear();
    bool placed = tail == 0;
    // A code of the greatest length costs the others as much as if it were this frequent.
    const std::uint64_t floor = tail_[0] >> kMaxCodeBits;
    std::uint64_t raised = 0;
    auto add = [&](std::uint64_t weight) {
      weights_.push_back(std::max(weight, floor));
      raised += weights_.back() - weight;
    };
    for (std::size_t i = direct; i-- > 0;) {
      const std::uint64_t count = counts_[order_[i]];
      if (!placed && tail <= count) {
        add(tail);
        placed = true;
      }
      add(count);
    }
    if (!placed) add(tail);
    const auto span = static_cast<std::uint64_t>(greatest_[direct - 1] - least_[direct - 1]);
    return huffman_bits() - kMaxCodeBits * raised + 8 * (tail - least_tail_) + 4 * span;
  }

  CodeTable table(std::size_t direct) const {
    const std::uint64_t tail = tail_[direct];
    std::vector<int> symbols(order_.begin(), order_.begin() + static_cast<std::ptrdiff_t>(direct));
    if (tail != 0) symbols.push_back(static_cast<int>(kEscape));
    auto weight = [&](int s) { return s == static_cast<int>(kEscape) ? tail : counts_[s]; };
    std::sort(symbols.begin(), symbols.end(), [&](int a, int b) {
      return std::make_pair(weight(a), a) < std::make_pair(weight(b), b);
    });
    std::vector<std::uint64_t> weights(symbols.size());
    std::transform(symbols.begin(), symbols.end(), weights.begin(), weight);
    const auto lengths = package_merge(weights);
    CodeTable table;
    for (std::size_t i = 0; i < symbols.size(); ++i) table.lengths[symbols[i]] = lengths[i];
    while (tail != 0 && table.lengths[table.placeholder] != 0) ++table.placeholder;
    return table;
  }

 private:
  // Sum of the inner nodes of the Huffman tree of `weights_`, which ascend (two queues: the leaves,
  // and the inner nodes, which come up in ascending order).
  std::uint64_t huffman_bits() {
    constexpr std::uint64_t kNone = ~std::uint64_t{0};
    const std::size_t nodes = weights_.size() - 1;
    weights_.push_back(kNone);
    inner_.assign(nodes + 1, kNone);
    std::size_t leaf = 0;
    std::size_t node = 0;
    std::uint64_t bits = 0;
    auto take = [&] { return weights_[leaf] <= inner_[node] ? weights_[leaf++] : inner_[node++]; };
    for (std::size_t made = 0; made < nodes; ++made) {
      const std::uint64_t first = take();
      inner_[made] = first + take();
      bits += inner_[made];
    }
    return bits;
  }

  const Counts& counts_;
  std::vector<int> order_;
  std::uint64_t least_tail_;          // of a table that must have an escape
  std::vector<std::uint64_t> tail_;   // of the values from the i-th on
  std::vector<int> least_, greatest_; // of the first i + 1 values
  std::vector<std::uint64_t> weights_;
  std::vector<std::uint64_t> inner_;
};

}  // namespace

CodeTable build_table(const Counts& counts, bool escapes, bool always_escape) {
  Alphabet alphabet(counts, escapes && always_escape);
  const std::size_t most = alphabet.size();
  if (!escapes) return alphabet.table(most);
  std::size_t best = most;
  std::uint64_t least = alphabet.cost(most);
  auto consider = [&](std::size_t direct) {
    const std::uint64_t cost = alphabet.cost(direct);
    if (cost >= least) return;
    least = cost;
    best = direct;
  };
  // The cost over the number of values with a code has one valley in practice: coarse, then fine.
  const std::size_t step = most / 16 + 1;
  for (std::size_t direct = most; direct > step;) consider(direct -= step);
  const std::size_t centre = best;
  for (std::size_t d = 1; d < step; ++d) {
    if (centre + d <= most) consider(centre + d);
    if (centre > d) consider(centre - d);
  }
  return alphabet.table(best);
}

}  // namespace slc1
