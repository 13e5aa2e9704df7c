// Positions that are equal, found once: labels repeat, and their codes need to be made once.
#pragma once
#include <stdint.h>
#include <string.h>

#include <vector>

namespace fastpe {
namespace {

// Rows [begin(u), end(u)) of `order` are the indices of equal positions, in order of appearance.
class Groups {
 public:
  // positions [rows, width]
  Groups(const double *positions, int64_t rows, int64_t width, bool group)
      : order_(size_t(rows)), start_(1, 0) {
    if (!group) {
      for (int64_t i = 0; i < rows; ++i) order_[size_t(i)] = i, start_.push_back(i + 1);
      return;
    }
    size_t slots = 16;
    while (slots < 2 * size_t(rows)) slots *= 2;
    std::vector<int64_t> table(slots, -1), group_of(static_cast<size_t>(rows));
    std::vector<int64_t> first, count;
    for (int64_t i = 0; i < rows; ++i) {
      const double *p = positions + i * width;
      size_t slot = hash(p, width) & (slots - 1);
      while (table[slot] >= 0 && !equal(positions + first[size_t(table[slot])] * width, p, width))
        slot = (slot + 1) & (slots - 1);
      if (table[slot] < 0) {
        table[slot] = int64_t(first.size());
        first.push_back(i), count.push_back(0);
      }
      group_of[size_t(i)] = table[slot];
      ++count[size_t(table[slot])];
    }
    for (int64_t n : count) start_.push_back(start_.back() + n);
    std::vector<int64_t> next(start_.begin(), start_.end() - 1);
    for (int64_t i = 0; i < rows; ++i) order_[size_t(next[size_t(group_of[size_t(i)])]++)] = i;
  }

  int64_t size() const { return int64_t(start_.size()) - 1; }
  int64_t begin(int64_t u) const { return start_[size_t(u)]; }
  int64_t end(int64_t u) const { return start_[size_t(u) + 1]; }
  int64_t row(int64_t i) const { return order_[size_t(i)]; }

 private:
  static size_t hash(const double *p, int64_t width) {
    uint64_t h = 1469598103934665603u;
    for (int64_t l = 0; l < width; ++l) {
      double x = p[l] + 0.0;  // -0 and 0 are one position
      uint64_t bits;
      memcpy(&bits, &x, 8);
      h = (h ^ bits) * 0x9E3779B97F4A7C15u;
      h ^= h >> 32;
    }
    return size_t(h);
  }
  static bool equal(const double *p, const double *q, int64_t width) {
    for (int64_t l = 0; l < width; ++l)
      if (p[l] != q[l]) return false;
    return true;
  }

  std::vector<int64_t> order_, start_;
};

}  // namespace
}  // namespace fastpe
