// Sines projected by noise (SineSPE), without codes: for tokens that all have different positions.
//
// For each token y = u Z and du = dy Z^T, with u = x_d (gain cos, gain sin, gate)_d.
#pragma once
#include "gemm.h"
#include "sine_block.h"

namespace fastpe {
namespace {

template <class S> class ProjectedSines {
 public:
  // noise: [H, D, J, padded R]; by_row: its transpose [H, R, ld_noise], in the order of place(),
  // used for gradients
  ProjectedSines(const FastpeSineFeatures &args, const Groups &groups, const S *noise,
                 const S *by_row)
      : args_(args), at_(args, groups), noise_(noise), by_row_(by_row),
        parameters_(wants_parameters(args)), width_(padded<S>(args.R)), ldj_(ld_noise(args)),
        x_(kPositions * at_.ldx), y_(kPositions * width_),
        sum_(args.grad_y.data ? 1 : kPositions * width_), expanded_(at_.ldk), grad_x_(at_.ldx),
        u_(args.grad_y.data ? kPositions * ldj_ : 1), sums_((2 + args.L) * at_.ldk) {}

  static int64_t ld_noise(const FastpeSineFeatures &args) {
    return padded<S>(args.D * args.J) + kLanes<S>;
  }
  // the place of row `row` of component d: cosines, then sines, then gates
  static int64_t place(const FastpeSineFeatures &args, int64_t d, int64_t row) {
    const int64_t dk = args.D * args.K;
    return row == 2 * args.K ? 2 * dk + d : (row % 2) * dk + d * args.K + row / 2;
  }

  void run(int64_t h, int64_t begin, int64_t end, double *partial) {
    h_ = h;
    at_.enter(h);
    for (int64_t u = begin; u < end; u += kPositions) {
      const int64_t n = smaller(kPositions, end - u);
      at_.make_rows(u, n);
      for (int64_t p = 0; p < n; ++p)
        at_.tokens(u + p, 0, 1, [&](int64_t, int64_t b, int64_t t) {
          at_.read_x(b, t, x_ + p * at_.ldx);
          if (args_.grad_y.data) at_.read_grad(b, t, y_ + p * width_);
        });
      args_.grad_y.data ? backward(u, n, partial) : forward(u, n);
    }
  }

 private:
  // components at a time: their noise fits the first-level cache, and their sum is rounded alone
  static constexpr int64_t kComponents = 4;

  // repeat x_d for each sine of component d
  void expand(const S *x) {
    for (int64_t d = 0, i = 0; d < args_.D; ++d)
      for (int64_t j = 0; j < args_.K; ++j, ++i) expanded_[i] = x[d];
  }

  void forward(int64_t u, int64_t n) {
    for (int64_t p = 0; p < n; ++p) {
      expand(x_ + p * at_.ldx);
      for (int64_t i = 0; i < at_.dk; i += kLanes<S>) {
        Vec<S> content = load(expanded_ + i);
        S *cos = at_.row_cosines + p * at_.ldk + i, *sin = at_.row_sines + p * at_.ldk + i;
        store(cos, load(cos) * content);
        store(sin, load(sin) * content);
      }
      for (int64_t d = 0; d < args_.D; d += kLanes<S>)
        store(x_ + p * at_.ldx + d, load(x_ + p * at_.ldx + d) * load(at_.gate + d));
    }
    const int64_t k = args_.K;
    zero<S>(y_, n * width_);
    for (int64_t first = 0; first < args_.D; first += kComponents) {
      Product<S> terms[3 * kComponents];
      int count = 0;
      for (int64_t d = first; d < smaller(args_.D, first + kComponents); ++d) {
        const S *z = noise_ + (h_ * args_.D + d) * args_.J * width_;
        terms[count++] = {k, at_.row_cosines + d * k, at_.ldk, 1, z, 2 * width_};
        terms[count++] = {k, at_.row_sines + d * k, at_.ldk, 1, z + width_, 2 * width_};
        if (args_.gate) terms[count++] = {1, x_ + d, at_.ldx, 1, z + 2 * k * width_, 0};
      }
      multiply<S>(n, width_, terms, count, {sum_, width_});
      for (int64_t i = 0; i < n * width_; i += kLanes<S>)
        store(y_ + i, load(y_ + i) + load(sum_ + i));
    }
    for (int64_t p = 0; p < n; ++p)
      at_.tokens(u + p, 0, 1, [&](int64_t, int64_t b, int64_t t) {
        Rows<S>(args_.y, b, h_, args_.R).put(t, y_ + p * width_);
      });
  }

  void backward(int64_t u, int64_t n, double *partial) {
    const int64_t k = args_.K;
    Product<S> product = {args_.R, y_, width_, 1, by_row_ + h_ * args_.R * ldj_, ldj_};
    multiply<S>(n, ldj_, &product, 1, {u_, ldj_});
    zero<S>(sums_, (2 + args_.L) * at_.ldk);
    for (int64_t p = 0; p < n; ++p) {
      const S *x = x_ + p * at_.ldx, *by_cos = u_ + p * ldj_, *by_sin = by_cos + at_.dk;
      const S *by_gate = by_sin + at_.dk;
      const S *cos = at_.cosines + p * at_.ldk, *sin = at_.sines + p * at_.ldk;
      expand(x);
      // the weighted rows make room for the gradients by x_d (not yet summed over k) and phases
      S *by_x = at_.row_cosines + p * at_.ldk, *by_phase = at_.row_sines + p * at_.ldk;
      for (int64_t i = 0; i < at_.dk; i += kLanes<S>) {
        Vec<S> c = load(cos + i), s = load(sin + i), gc = load(by_cos + i), gs = load(by_sin + i);
        Vec<S> value = gc * c + gs * s, content = load(expanded_ + i), gain = load(at_.gain + i);
        Vec<S> slope = (gs * c - gc * s) * content;
        store(by_x + i, value * gain);
        store(by_phase + i, slope * gain);
        store(sums_ + i, load(sums_ + i) + value * content);
        store(sums_ + at_.ldk + i, load(sums_ + at_.ldk + i) + slope);
        for (int64_t l = 0; l < args_.L; ++l) {
          S *sum = sums_ + (2 + l) * at_.ldk + i;
          store(sum, load(sum) + slope * S(at_.position(u + p)[l]));
        }
      }
      at_.tokens(u + p, 0, 1, [&](int64_t, int64_t b, int64_t t) {
        for (int64_t d = 0; d < args_.D; ++d) {
          S total = args_.gate ? at_.gate[d] * by_gate[d] : S(0);
          for (int64_t j = 0; j < k; ++j) total += by_x[d * k + j];
          grad_x_[d] = total;
          if (parameters_ && args_.gate)
            partial[(2 + args_.L) * at_.dk + d] += double(x[d]) * double(by_gate[d]);
        }
        if (args_.grad_x.data) Rows<S>(args_.grad_x, b, h_, args_.D).put(t, grad_x_);
        for (int64_t l = 0; args_.grad_positions && l < args_.L; ++l) {
          const double *freq = at_.freq + l * at_.ldk;
          double total = 0;
          for (int64_t i = 0; i < at_.dk; ++i) total += double(by_phase[i]) * freq[i];
          at_.grad_position(b, t, l) = kTwoPi * total;
        }
      });
    }
    if (!parameters_) return;
    for (int64_t i = 0; i < at_.dk; ++i) {
      partial[i] += double(sums_[i]);
      partial[at_.dk + i] += double(sums_[at_.ldk + i]);
      for (int64_t l = 0; l < args_.L; ++l)
        partial[2 * at_.dk + i * args_.L + l] += double(sums_[(2 + l) * at_.ldk + i]);
    }
  }

  const FastpeSineFeatures &args_;
  SineBlock<S> at_;
  const S *noise_, *by_row_;
  const bool parameters_;
  const int64_t width_, ldj_;
  int64_t h_ = 0;
  Scratch<S> x_, y_, sum_, expanded_, grad_x_, u_, sums_;
};

}  // namespace
}  // namespace fastpe
