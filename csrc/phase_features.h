// Features of SPE and F-StrIPE, and their gradient, without codes for every token.
//
// At one position and head the map is a matrix, its code [D, R]: y = x code. Codes are made for a
// few different positions at a time, used for all tokens at these positions, and forgotten:
//
//     noise    code_d = sum_k gain_dk (cos Z_d,2k + sin Z_d,2k+1) + gate_d Z_d,2K     a product
//     pooled   code_d = (gain_dk cos, gain_dk sin)_k
//     kept     no sum over d: y_dj = x_d row_dj
//
// Gradients of the parameters come from the gradient of the code, sum of x (x) grad_y over the
// tokens at a position; where no two tokens share a position, straight from grad_y Z^T. Inside, cosines stand before sines in blocks of `kp_` (the gate behind the
// cosines); tensors have them in turn, as published.
#pragma once
#include "gemm.h"
#include "groups.h"

namespace fastpe {
namespace {

constexpr int64_t kPositions = 16;  // codes at a time
constexpr int64_t kTokens = 32;     // tokens at a time
constexpr int64_t kSlices = 16;     // of the positions of a head, whatever the number of threads

// the noise as the products want it
template <class S>
struct Noise {
  const S *rows = nullptr;        // [H, D, J, padded R]
  const S *transposed = nullptr;  // [H, D, R, 2 kp], or if alone [H, R, ldj]: cosines, sines, gates
  int64_t ldj = 0;
  bool alone = false;  // no two tokens share a position
};

template <class S>
class Sines {
 public:
  Sines(const FastpePhaseFeatures &args, const Groups &groups, Noise<S> noise, int64_t kp)
      : args_(args),
        groups_(groups),
        noise_(noise),
        kp_(kp),
        dk_(args.D * args.K),
        ldk_(padded<S>(dk_) + kp),
        keep_(!args.noise && !args.pool),
        width_(args.noise ? padded<S>(args.R) : 2 * kp),
        ldx_(padded<S>(args.D)),
        gradient_(args.grad_gain || args.grad_freq || args.grad_offset || args.grad_gate),
        at_once_(smaller(kPositions, groups.size())),
        cos_(at_once_ * ldk_),
        sin_(at_once_ * ldk_),
        row_cos_(at_once_ * ldk_),
        row_sin_(at_once_ * ldk_),
        code_(at_once_ * ldx_ * width_),
        code_grad_(args.grad_y.data ? at_once_ * ldx_ * width_ : 1),
        slope_code_(args.grad_positions ? ldx_ * width_ : 1),
        slope_cos_(args.grad_positions ? ldk_ : 1),
        slope_sin_(args.grad_positions ? ldk_ : 1),
        code_transposed_(width_ * ldx_),
        x_(kTokens * ldx_),
        grad_x_(kTokens * ldx_),
        y_(kTokens * width_),
        projected_(kTokens * width_),
        space_(padded<S>(larger(args.R, args.D))),
        out_(padded<S>(larger(args.R, args.D))),
        by_row_(kPositions * 2 * kp),
        gate_(args.D),
        gain_(ldk_),
        by_noise_(noise.alone ? kPositions * noise.ldj : 1),
        sums_((2 + args.L) * ldk_),
        expanded_(ldk_),
        step_cos_(at_once_ > 2 ? kPositions * ldk_ : 1),
        step_sin_(at_once_ > 2 ? kPositions * ldk_ : 1),
        freq_(args.L * ldk_),
        offset_(ldk_),
        step_(args.L),
        multiple_(args.L) {}

  // doubles that `run` adds to: d gain, d phase, d phase * position [DK each], d gate [D]
  static int64_t partial_size(const FastpePhaseFeatures &args) {
    return (2 + args.L) * args.D * args.K + args.D;
  }

  void run(int64_t h, int64_t slice, double *partial) {
    const int64_t begin = groups_.size() * slice / kSlices;
    const int64_t end = groups_.size() * (slice + 1) / kSlices;
    if (begin == end) return;
    head_ = h;
    for (int64_t i = 0; i < dk_; ++i) {
      gain_[i] = S(args_.gain[h * dk_ + i]);
      offset_[i] = args_.offset ? args_.offset[h * dk_ + i] : 0;
      for (int64_t l = 0; l < args_.L; ++l)
        freq_[l * ldk_ + i] = args_.freq[(h * dk_ + i) * args_.L + l];
    }
    for (int64_t d = 0; d < args_.D; ++d)
      gate_[d] = args_.gate ? S(args_.gate[h * args_.D + d]) : S(0);
    for (int64_t u = begin; u < end; u += kPositions) {
      const int64_t n = smaller(kPositions, end - u);
      make_rows(u, n);
      if (noise_.alone) {
        backward_alone(u, n, partial);
        continue;
      }
      if (!keep_) make_codes(n, row_cos_, row_sin_, true, code_);
      if (args_.grad_y.data) {
        memset((void *)(S *)code_grad_, 0, sizeof(S) * size_t(n * ldx_ * width_));
        for (int64_t p = 0; p < n; ++p) backward(p, u + p);
        if (gradient_) add_parameters(u, n, partial);
      } else {
        for (int64_t p = 0; p < n; ++p) forward(p, u + p);
      }
    }
  }

 private:
  const double *position(int64_t u) const {
    return args_.positions + groups_.row(groups_.begin(u)) * args_.L;
  }

  // cosines and sines of n positions from the u-th on
  void make_rows(int64_t u, int64_t n) {
    const bool even = evenly_spaced(u, n);
    for (int64_t p = 0; p < n; ++p) {
      S *cos = cos_ + p * ldk_, *sin = sin_ + p * ldk_;
      if (p == 0 || !even) {
        sincos_row(position(u + p), offset_, cos, sin);
      } else {
        // turned on from the first by a multiple of the step
        const S *step_cos = step_cos_ + p * ldk_, *step_sin = step_sin_ + p * ldk_;
        for (int64_t i = 0; i < dk_; i += kLanes<S>) {
          Vec<S> c = load(cos_ + i), s = load(sin_ + i);
          Vec<S> dc = load(step_cos + i), ds = load(step_sin + i);
          store(cos + i, c * dc - s * ds), store(sin + i, s * dc + c * ds);
        }
      }
      for (int64_t i = 0; i < dk_; i += kLanes<S>) {
        Vec<S> gain = load(gain_ + i);
        store(row_cos_ + p * ldk_ + i, load(cos + i) * gain);
        store(row_sin_ + p * ldk_ + i, load(sin + i) * gain);
      }
    }
  }

  // whether the positions are first + p step; then makes step_cos_ and step_sin_ for that step
  bool evenly_spaced(int64_t u, int64_t n) {
    if (n < 3) return false;
    const double *first = position(u), *second = position(u + 1);
    bool same = step_head_ == head_;
    for (int64_t l = 0; l < args_.L; ++l) {
      for (int64_t p = 2; p < n; ++p)
        if (position(u + p)[l] != first[l] + double(p) * (second[l] - first[l])) return false;
      same = same && step_[l] == second[l] - first[l];
    }
    if (same) return true;
    step_head_ = head_;
    for (int64_t l = 0; l < args_.L; ++l) step_[l] = second[l] - first[l];
    for (int64_t p = 1; p < kPositions; ++p) {
      for (int64_t l = 0; l < args_.L; ++l) multiple_[l] = double(p) * step_[l];
      sincos_row(multiple_, nullptr, step_cos_ + p * ldk_, step_sin_ + p * ldk_);
    }
    return true;
  }

  void sincos_row(const double *at, const double *offset, S *cos, S *sin) const {
    constexpr int64_t lanes = kLanes<S>;
    for (int64_t i = 0; i < dk_; i += lanes) {
      double turns[lanes];
      S reduced[lanes];
      for (int64_t j = 0; j < lanes; ++j) turns[j] = offset ? offset[i + j] : 0;
      for (int64_t l = 0; l < args_.L; ++l)
        for (int64_t j = 0; j < lanes; ++j) turns[j] += freq_[l * ldk_ + i + j] * at[l];
      for (int64_t j = 0; j < lanes; ++j) reduced[j] = S(reduce_turns(turns[j]));
      Vec<S> c, s;
      sincos_of<S>(load(reduced), s, c);
      store(cos + i, c), store(sin + i, s);
    }
  }

  // codes [n, ldx, width] from weighted cosines and sines [n, ldk]
  void make_codes(int64_t n, const S *row_cos, const S *row_sin, bool gated, S *code) {
    const int64_t k = args_.K, stride = ldx_ * width_;
    for (int64_t d = 0; d < args_.D; ++d) {
      if (args_.noise) {
        const S *z = noise_.rows + (head_ * args_.D + d) * args_.J * width_;
        Product<S> terms[] = {{k, row_cos + d * k, ldk_, 1, z, 2 * width_},
                              {k, row_sin + d * k, ldk_, 1, z + width_, 2 * width_},
                              {1, gate_ + d, 0, 0, z + 2 * k * width_, 0}};
        multiply<S>(n, width_, terms, gated && args_.gate ? 3 : 2, false, code + d * width_, stride);
      } else {
        for (int64_t p = 0; p < n; ++p) {
          S *row = code + p * stride + d * width_;
          for (int64_t j = 0; j < k; ++j)
            row[j] = row_cos[p * ldk_ + d * k + j], row[kp_ + j] = row_sin[p * ldk_ + d * k + j];
        }
      }
    }
  }

  // calls visit(b, t) for the tokens of group u from the i-th to the end-th
  template <class Visit>
  void tokens(int64_t u, int64_t i, int64_t end, Visit visit) const {
    const int64_t times = args_.Bp == 1 ? args_.B : 1, first = groups_.begin(u);
    for (int64_t n = 0; i < end; ++i, ++n) {
      const int64_t row = groups_.row(first + i / times);
      visit(n, args_.Bp == 1 ? i % times : row / args_.T, args_.Bp == 1 ? row : row % args_.T);
    }
  }
  int64_t token_count(int64_t u) const {
    return (groups_.end(u) - groups_.begin(u)) * (args_.Bp == 1 ? args_.B : 1);
  }

  void read(const FastpeTensor &x, int64_t width, int64_t b, int64_t t, S *out) {
    const S *row = Rows<S>(x, b, head_, width).get(t, space_);
    for (int64_t j = 0; j < width; j += kLanes<S>) store(out + j, load(row + j));
  }
  // features as the tensor has them into blocks of cosines and sines
  void read_features(const FastpeTensor &y, int64_t b, int64_t t, S *out) {
    if (args_.noise) return read(y, args_.R, b, t, out);
    const S *row = Rows<S>(y, b, head_, args_.R).get(t, space_);
    for (int64_t j = 0; j < args_.K; ++j) out[j] = row[2 * j], out[kp_ + j] = row[2 * j + 1];
  }
  void write_features(int64_t b, int64_t t, const S *y) {
    Rows<S> out(args_.y, b, head_, args_.R);
    if (args_.noise) return out.put(t, y);
    for (int64_t j = 0; j < args_.K; ++j) out_[2 * j] = y[j], out_[2 * j + 1] = y[kp_ + j];
    out.put(t, out_);
  }

  void forward(int64_t p, int64_t u) {
    const int64_t total = token_count(u);
    if (keep_) {
      return tokens(u, 0, total, [&](int64_t, int64_t b, int64_t t) {
        read(args_.x, args_.D, b, t, x_);
        keep_rows(p, x_, out_);
        Rows<S>(args_.y, b, head_, args_.R).put(t, out_);
      });
    }
    for (int64_t i = 0; i < total; i += kTokens) {
      const int64_t end = smaller(total, i + kTokens);
      tokens(u, i, end, [&](int64_t n, int64_t b, int64_t t) {
        read(args_.x, args_.D, b, t, x_ + n * ldx_);
      });
      Product<S> product = {args_.D, x_, ldx_, 1, code_ + p * ldx_ * width_, width_};
      multiply<S>(end - i, width_, &product, 1, false, y_, width_);
      tokens(u, i, end,
             [&](int64_t n, int64_t b, int64_t t) { write_features(b, t, y_ + n * width_); });
    }
  }

  // y_dj = x_d row_dj
  void keep_rows(int64_t p, const S *x, S *y) const {
    const S *row_cos = row_cos_ + p * ldk_, *row_sin = row_sin_ + p * ldk_;
    const int64_t k = args_.K, rows = args_.J;
    if (rows == 2) {
      for (int64_t d = 0; d < args_.D; ++d)
        y[2 * d] = x[d] * row_cos[d], y[2 * d + 1] = x[d] * row_sin[d];
      return;
    }
    for (int64_t d = 0; d < args_.D; ++d, y += rows) {
      for (int64_t j = 0; j < k; ++j)
        y[2 * j] = x[d] * row_cos[d * k + j], y[2 * j + 1] = x[d] * row_sin[d * k + j];
      if (args_.gate) y[2 * k] = x[d] * gate_[d];
    }
  }

  void backward(int64_t p, int64_t u) {
    const int64_t total = token_count(u);
    if (keep_) {
      return tokens(u, 0, total, [&](int64_t, int64_t b, int64_t t) {
        read(args_.x, args_.D, b, t, x_);
        keep_rows_adjoint(p, Rows<S>(args_.grad_y, b, head_, args_.R).get(t, space_));
        if (args_.grad_x.data) Rows<S>(args_.grad_x, b, head_, args_.D).put(t, grad_x_);
        if (args_.grad_positions) {
          for (int64_t l = 0; l < args_.L; ++l) {
            make_slopes(p, l);
            const S *y = Rows<S>(args_.grad_y, b, head_, args_.R).get(t, space_);
            double sum = 0;
            for (int64_t d = 0; d < args_.D; ++d)
              for (int64_t j = 0, i = d * args_.K; j < args_.K; ++j, ++i)
                sum += double(x_[d]) * (double(slope_cos_[i]) * y[d * args_.J + 2 * j] +
                                        double(slope_sin_[i]) * y[d * args_.J + 2 * j + 1]);
            grad_position(b, t, l) = sum;
          }
        }
      });
    }
    const S *code = code_ + p * ldx_ * width_;
    const bool many = total >= 4;
    if (args_.grad_x.data && many) transpose<S>(code, width_, ldx_, width_, code_transposed_, ldx_);
    for (int64_t i = 0; i < total; i += kTokens) {
      const int64_t end = smaller(total, i + kTokens), n = end - i;
      tokens(u, i, end, [&](int64_t k, int64_t b, int64_t t) {
        read(args_.x, args_.D, b, t, x_ + k * ldx_);
        read_features(args_.grad_y, b, t, y_ + k * width_);
      });
      if (args_.grad_x.data) {
        if (many) {
          Product<S> product = {width_, y_, width_, 1, code_transposed_, ldx_};
          multiply<S>(n, ldx_, &product, 1, false, grad_x_, ldx_);
        } else {
          for (int64_t k = 0; k < n; ++k)
            for (int64_t d = 0; d < args_.D; ++d)
              grad_x_[k * ldx_ + d] = dot(y_ + k * width_, code + d * width_);
        }
        tokens(u, i, end, [&](int64_t k, int64_t b, int64_t t) {
          Rows<S>(args_.grad_x, b, head_, args_.D).put(t, grad_x_ + k * ldx_);
        });
      }
      if (gradient_) {
        Product<S> product = {n, x_, 1, ldx_, y_, width_};
        multiply<S>(args_.D, width_, &product, 1, true, code_grad_ + p * ldx_ * width_, width_);
      }
      if (args_.grad_positions) {
        for (int64_t l = 0; l < args_.L; ++l) {
          make_slopes(p, l);
          make_codes(1, slope_cos_, slope_sin_, false, slope_code_);
          Product<S> product = {args_.D, x_, ldx_, 1, slope_code_, width_};
          multiply<S>(n, width_, &product, 1, false, projected_, width_);
          tokens(u, i, end, [&](int64_t k, int64_t b, int64_t t) {
            grad_position(b, t, l) = double(dot(projected_ + k * width_, y_ + k * width_));
          });
        }
      }
    }
  }

  // n positions with one token each: grad_y Z^T gives every gradient
  void backward_alone(int64_t u, int64_t n, double *partial) {
    const int64_t k = args_.K, ldj = noise_.ldj;
    for (int64_t p = 0; p < n; ++p)
      tokens(u + p, 0, 1, [&](int64_t, int64_t b, int64_t t) {
        read(args_.x, args_.D, b, t, x_ + p * ldx_);
        read(args_.grad_y, args_.R, b, t, y_ + p * width_);
      });
    Product<S> product = {args_.R, y_, width_, 1, noise_.transposed + head_ * args_.R * ldj, ldj};
    multiply<S>(n, ldj, &product, 1, false, by_noise_, ldj);
    memset((void *)(S *)sums_, 0, sizeof(S) * size_t((2 + args_.L) * ldk_));
    for (int64_t p = 0; p < n; ++p) {
      const S *x = x_ + p * ldx_, *by_cos = by_noise_ + p * ldj, *by_sin = by_cos + dk_;
      const S *by_gate = by_cos + 2 * dk_, *cos = cos_ + p * ldk_, *sin = sin_ + p * ldk_;
      for (int64_t d = 0; d < args_.D; ++d)
        for (int64_t j = 0; j < k; ++j) expanded_[d * k + j] = x[d];
      // the gradients by x_d, before the sum over k, and by the phases take the weights' places
      S *by_x = row_cos_ + p * ldk_, *by_phase = row_sin_ + p * ldk_;
      for (int64_t i = 0; i < dk_; i += kLanes<S>) {
        Vec<S> c = load(cos + i), s = load(sin + i), gc = load(by_cos + i), gs = load(by_sin + i);
        Vec<S> value = gc * c + gs * s, content = load(expanded_ + i), gain = load(gain_ + i);
        Vec<S> slope = (gs * c - gc * s) * content;
        store(by_x + i, value * gain), store(by_phase + i, slope * gain);
        store(sums_ + i, load(sums_ + i) + value * content);
        store(sums_ + ldk_ + i, load(sums_ + ldk_ + i) + slope);
        for (int64_t l = 0; l < args_.L; ++l) {
          S *sum = sums_ + (2 + l) * ldk_ + i;
          store(sum, load(sum) + slope * S(position(u + p)[l]));
        }
      }
      tokens(u + p, 0, 1, [&](int64_t, int64_t b, int64_t t) {
        for (int64_t d = 0; d < args_.D; ++d) {
          S total = args_.gate ? gate_[d] * by_gate[d] : S(0);
          for (int64_t j = 0; j < k; ++j) total += by_x[d * k + j];
          grad_x_[d] = total;
          if (gradient_ && args_.gate)
            partial[(2 + args_.L) * dk_ + d] += double(x[d]) * double(by_gate[d]);
        }
        if (args_.grad_x.data) Rows<S>(args_.grad_x, b, head_, args_.D).put(t, grad_x_);
        for (int64_t l = 0; args_.grad_positions && l < args_.L; ++l) {
          double total = 0;
          for (int64_t i = 0; i < dk_; ++i) total += double(by_phase[i]) * freq_[l * ldk_ + i];
          grad_position(b, t, l) = kTwoPi * total;
        }
      });
    }
    if (!gradient_) return;
    for (int64_t i = 0; i < dk_; ++i) {
      partial[i] += double(sums_[i]), partial[dk_ + i] += double(sums_[ldk_ + i]);
      for (int64_t l = 0; l < args_.L; ++l)
        partial[2 * dk_ + i * args_.L + l] += double(sums_[(2 + l) * ldk_ + i]);
    }
  }

  double &grad_position(int64_t b, int64_t t, int64_t l) const {
    return args_.grad_positions[((b * args_.H + head_) * args_.T + t) * args_.L + l];
  }

  S dot(const S *a, const S *b) const {
    Vec<S> total = {};
    for (int64_t j = 0; j < width_; j += kLanes<S>) total += load(a + j) * load(b + j);
    return sum<S>(total);
  }

  // the weighted rows by component l of the position
  void make_slopes(int64_t p, int64_t l) {
    for (int64_t i = 0; i < dk_; ++i) {
      const S factor = S(kTwoPi * freq_[l * ldk_ + i]);
      slope_cos_[i] = -row_sin_[p * ldk_ + i] * factor;
      slope_sin_[i] = row_cos_[p * ldk_ + i] * factor;
    }
  }

  // grad_x_ from the gradient y of what keep_rows gave for x_; code_grad_ gathers x_d y_dj
  void keep_rows_adjoint(int64_t p, const S *y) {
    const S *row_cos = row_cos_ + p * ldk_, *row_sin = row_sin_ + p * ldk_;
    const int64_t k = args_.K;
    for (int64_t d = 0; d < args_.D; ++d, y += args_.J) {
      S *code = code_grad_ + p * ldx_ * width_ + d * width_, total = 0;
      for (int64_t j = 0; j < k; ++j) {
        total += row_cos[d * k + j] * y[2 * j] + row_sin[d * k + j] * y[2 * j + 1];
        code[j] += x_[d] * y[2 * j], code[kp_ + j] += x_[d] * y[2 * j + 1];
      }
      if (args_.gate) total += gate_[d] * y[2 * k], code[k] += x_[d] * y[2 * k];
      grad_x_[d] = total;
    }
  }

  void add_parameters(int64_t u, int64_t n, double *partial) {
    double *by_gain = partial, *by_phase = partial + dk_, *by_freq = partial + 2 * dk_;
    double *by_gate = partial + (2 + args_.L) * dk_;
    const int64_t k = args_.K, lanes = kLanes<S>;
    for (int64_t d = 0; d < args_.D; ++d) {
      // gradients by the unweighted rows, [n, 2 kp]
      S *rows = code_grad_ + d * width_;
      int64_t ld = ldx_ * width_;
      if (args_.noise) {
        const S *z = noise_.transposed + (head_ * args_.D + d) * args_.R * 2 * kp_;
        Product<S> product = {args_.R, rows, ld, 1, z, 2 * kp_};
        multiply<S>(n, 2 * kp_, &product, 1, false, by_row_, 2 * kp_);
        rows = by_row_, ld = 2 * kp_;
      }
      if (args_.gate)
        for (int64_t p = 0; p < n; ++p) by_gate[d] += double(rows[p * ld + k]), rows[p * ld + k] = 0;
      for (int64_t j = 0; j < k; j += lanes) {
        Vec<S> gain = {}, phase = {}, phases[kPositions];
        for (int64_t p = 0; p < n; ++p) {
          Vec<S> c = load(cos_ + p * ldk_ + d * k + j), s = load(sin_ + p * ldk_ + d * k + j);
          Vec<S> gc = load(rows + p * ld + j), gs = load(rows + p * ld + kp_ + j);
          gain += gc * c + gs * s;
          phases[p] = gs * c - gc * s;
          phase += phases[p];
        }
        const int64_t count = smaller(lanes, k - j);
        for (int64_t i = 0; i < count; ++i) {
          by_gain[d * k + j + i] += double(gain[i]);
          by_phase[d * k + j + i] += double(phase[i]);
        }
        for (int64_t l = 0; l < args_.L; ++l) {
          Vec<S> total = {};
          for (int64_t p = 0; p < n; ++p) total += phases[p] * S(position(u + p)[l]);
          for (int64_t i = 0; i < count; ++i)
            by_freq[(d * k + j + i) * args_.L + l] += double(total[i]);
        }
      }
    }
  }

  const FastpePhaseFeatures &args_;
  const Groups &groups_;
  const Noise<S> noise_;
  const int64_t kp_, dk_, ldk_;
  const bool keep_;
  const int64_t width_, ldx_;
  const bool gradient_;
  const int64_t at_once_;
  Scratch<S> cos_, sin_, row_cos_, row_sin_, code_, code_grad_, slope_code_, slope_cos_, slope_sin_;
  Scratch<S> code_transposed_, x_, grad_x_, y_, projected_, space_, out_, by_row_, gate_, gain_;
  Scratch<S> by_noise_, sums_, expanded_, step_cos_, step_sin_;
  Scratch<double> freq_, offset_;  // padded, [L, ldk] and [ldk]
  Scratch<double> step_, multiple_;
  int64_t head_ = 0, step_head_ = -1;
};

template <class S>
void phase_features(const FastpePhaseFeatures &args, bool backward) {
  const int64_t hd = args.H * args.D, r = args.R, rp = padded<S>(r), j = args.J, dk = args.D * args.K;
  const int64_t kp = padded<S>(args.K + (args.gate ? 1 : 0));
  const Groups groups(args.positions, args.Bp * args.T, args.L, args.group);
  const bool parameters = args.grad_gain || args.grad_freq || args.grad_offset || args.grad_gate;
  Noise<S> noise;
  noise.alone = args.noise && backward && groups.size() == args.B * args.T;
  noise.ldj = padded<S>(args.D * j) + kLanes<S>;
  const bool pad = args.noise && rp != r && !noise.alone;
  const bool transpose = args.noise && (noise.alone || parameters);
  Scratch<S> rows(pad ? hd * j * rp : 1);
  Scratch<S> transposed(!transpose ? 1 : noise.alone ? args.H * r * noise.ldj : hd * r * 2 * kp);
  const int64_t size = Sines<S>::partial_size(args), units = args.H * kSlices;
  Scratch<double> partial(parameters ? units * size : 1);
  noise.rows = pad ? (const S *)rows : (const S *)args.noise, noise.transposed = transposed;

  // where row `row` of component hd stands in the r-th column of Z^T
  auto place = [&](int64_t i, int64_t row, int64_t k) {
    const int64_t sine = row == 2 * args.K ? 2 : row % 2, h = i / args.D, d = i % args.D;
    if (!noise.alone) return (i * r + k) * 2 * kp + (sine == 2 ? args.K : row / 2 + sine * kp);
    return (h * r + k) * noise.ldj + sine * dk + (sine == 2 ? d : d * args.K + row / 2);
  };
#pragma omp parallel num_threads(args.threads)
  {
    if (pad || transpose) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < hd; ++i)
        for (int64_t row = 0; row < j; ++row) {
          const S *z = (const S *)args.noise + (i * j + row) * r;
          for (int64_t k = 0; k < r; ++k) {
            if (pad) rows[(i * j + row) * rp + k] = z[k];
            if (transpose) transposed[place(i, row, k)] = z[k];
          }
        }
    }
    Sines<S> sines(args, groups, noise, kp);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < units; ++i)
      sines.run(i / kSlices, i % kSlices, partial + (parameters ? i * size : 0));
  }
  if (!backward || !parameters) return;
  for (int64_t h = 0; h < args.H; ++h) {
    for (int64_t slice = 0; slice < kSlices; ++slice) {
      const double *x = partial + (h * kSlices + slice) * size;
      for (int64_t i = 0; i < dk; ++i) {
        const double slope = kTwoPi * args.gain[h * dk + i];
        if (args.grad_gain) args.grad_gain[h * dk + i] += x[i];
        if (args.grad_offset) args.grad_offset[h * dk + i] += slope * x[dk + i];
        for (int64_t l = 0; args.grad_freq && l < args.L; ++l)
          args.grad_freq[(h * dk + i) * args.L + l] += slope * x[2 * dk + i * args.L + l];
      }
      for (int64_t d = 0; args.grad_gate && d < args.D; ++d)
        args.grad_gate[h * args.D + d] += x[(2 + args.L) * dk + d];
    }
  }
}

}  // namespace
}  // namespace fastpe
