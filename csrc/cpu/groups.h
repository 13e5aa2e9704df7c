// Find tokens at equal positions, so that the sines of a position are made once.
#pragma once
#include "simd.h"

namespace fastpe {
namespace {

// Group u has the rows row(i) for i in [begin(u), end(u)). Groups are in order of appearance.
class Groups {
 public:
  // positions [rows, width]
  Groups(const double *positions, int64_t rows, int64_t width, bool group)
      : order_(rows + 1), start_(rows + 1) {
    if (!group) {
      for (int64_t i = 0; i <= rows; ++i) order_[i] = start_[i] = i;
      size_ = rows;
      return;
    }
    int64_t slots = 16;
    while (slots < 2 * rows) slots *= 2;
    // slot -> group + 1; group -> its first row; row -> group
    Scratch<int64_t> table(slots), first(rows + 1), group_of(rows + 1), next(rows + 1);
    for (int64_t i = 0; i < rows; ++i) {
      const double *p = positions + i * width;
      int64_t slot = int64_t(hash(p, width) & uint64_t(slots - 1));
      while (table[slot] && !equal(positions + first[table[slot] - 1] * width, p, width))
        slot = (slot + 1) & (slots - 1);
      if (!table[slot]) {
        first[size_] = i;
        table[slot] = ++size_;
      }
      group_of[i] = table[slot] - 1;
      ++start_[table[slot]];
    }
    for (int64_t u = 0; u < size_; ++u) {
      next[u] = start_[u];
      start_[u + 1] += start_[u];
    }
    for (int64_t i = 0; i < rows; ++i) order_[next[group_of[i]]++] = i;
  }

  int64_t size() const { return size_; }
  int64_t begin(int64_t u) const { return start_[u]; }
  int64_t end(int64_t u) const { return start_[u + 1]; }
  int64_t row(int64_t i) const { return order_[i]; }

 private:
  static uint64_t hash(const double *p, int64_t width) {
    uint64_t h = 1469598103934665603u;
    for (int64_t l = 0; l < width; ++l) {
      double x = p[l] + 0.0;  // -0 and 0 are equal
      uint64_t bits;
      memcpy(&bits, &x, 8);
      h = (h ^ bits) * 0x9E3779B97F4A7C15u;
      h ^= h >> 32;
    }
    return h;
  }
  static bool equal(const double *p, const double *q, int64_t width) {
    for (int64_t l = 0; l < width; ++l)
      if (p[l] != q[l]) return false;
    return true;
  }

  Scratch<int64_t> order_, start_;
  int64_t size_ = 0;
};

}  // namespace
}  // namespace fastpe
