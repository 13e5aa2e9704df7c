// Features of SPE and F-StrIPE, and their gradient, by codes that equal positions share.
//
// At one position of one head, the map is a matrix [D, R], its code: y = x code. The kernel makes
// the codes of a few positions, uses them for all tokens at these positions, and forgets them:
//
//     noise    code_d = sum_k gain_dk (cos Z_d,2k + sin Z_d,2k+1) + gate_d Z_d,2K     a product
//     pooled   code_d = (gain_dk cos, gain_dk sin)_k
//     kept     no sum over d: y_dj = x_d row_dj
//
// The gradient of a code is the sum of x (x) grad_y over the tokens at its position. Gradients of
// the parameters follow from it.
#pragma once
#include "gemm.h"
#include "sine_block.h"

namespace fastpe {
namespace {

template <class S> class CodedSines {
 public:
  // noise: [H, D, J, padded R]; by_row: its transpose [H, D, R, 2 kp], in the order of place(),
  // used for gradients of parameters
  CodedSines(const FastpeSineFeatures &args, const Groups &groups, const S *noise, const S *by_row)
      : args_(args), at_(args, groups), noise_(noise), by_row_(by_row),
        parameters_(wants_parameters(args)), keep_(!args.noise && !args.pool),
        width_(args.noise ? padded<S>(args.R) : 2 * at_.kp), code_(at_.at_once * at_.ldx * width_),
        code_grad_(args.grad_y.data ? at_.at_once * at_.ldx * width_ : 1),
        slope_code_(args.grad_positions ? at_.ldx * width_ : 1),
        slope_cos_(args.grad_positions ? at_.ldk : 1),
        slope_sin_(args.grad_positions ? at_.ldk : 1), code_transposed_(width_ * at_.ldx),
        x_(kTokens * at_.ldx), grad_x_(kTokens * at_.ldx), y_(kTokens * width_),
        projected_(kTokens * width_), row_(padded<S>(args.R)), by_sine_(kPositions * 2 * at_.kp) {}

  // the place of row `row` of a component: cosines and the gate, then sines
  static int64_t place(const FastpeSineFeatures &args, int64_t row) {
    return row == 2 * args.K ? args.K : row / 2 + (row % 2) * SineBlock<S>::half(args);
  }

  void run(int64_t h, int64_t begin, int64_t end, double *partial) {
    h_ = h;
    at_.enter(h);
    for (int64_t u = begin; u < end; u += kPositions) {
      const int64_t n = smaller(kPositions, end - u);
      at_.make_rows(u, n);
      if (!keep_) make_codes(n, at_.row_cosines, at_.row_sines, true, code_);
      if (args_.grad_y.data) {
        zero<S>(code_grad_, n * at_.ldx * width_);
        for (int64_t p = 0; p < n; ++p) backward(p, u + p);
        if (parameters_) add_parameters(u, n, partial);
      } else {
        for (int64_t p = 0; p < n; ++p) forward(p, u + p);
      }
    }
  }

 private:
  static constexpr int64_t kTokens = 32;  // at a time

  // make codes [n, ldx, width] from weighted cosines and sines [n, ldk]
  void make_codes(int64_t n, const S *row_cos, const S *row_sin, bool gated, S *code) {
    const int64_t k = args_.K, stride = at_.ldx * width_;
    for (int64_t d = 0; d < args_.D; ++d) {
      if (args_.noise) {
        const S *z = noise_ + (h_ * args_.D + d) * args_.J * width_;
        Product<S> terms[] = {{k, row_cos + d * k, at_.ldk, 1, z, 2 * width_},
                              {k, row_sin + d * k, at_.ldk, 1, z + width_, 2 * width_},
                              {1, at_.gate + d, 0, 0, z + 2 * k * width_, 0}};
        const int count = gated && args_.gate ? 3 : 2;
        multiply<S>(n, width_, terms, count, {code + d * width_, stride});
      } else {
        for (int64_t p = 0; p < n; ++p) {
          S *row = code + p * stride + d * width_;
          const S *cos = row_cos + p * at_.ldk + d * k, *sin = row_sin + p * at_.ldk + d * k;
          copy_n(row, cos, k);
          copy_n(row + at_.kp, sin, k);
        }
      }
    }
  }

  // read the gradient by the features in blocks of cosines and sines
  void read_features(int64_t b, int64_t t, S *out) {
    if (args_.noise) return at_.read_grad(b, t, out);
    const S *row = Rows<S>(args_.grad_y, b, h_, args_.R).get(t, row_);
    for (int64_t j = 0; j < args_.K; ++j) {
      out[j] = row[2 * j];
      out[at_.kp + j] = row[2 * j + 1];
    }
  }
  void write_features(int64_t b, int64_t t, const S *y) {
    Rows<S> out(args_.y, b, h_, args_.R);
    if (args_.noise) return out.put(t, y);
    for (int64_t j = 0; j < args_.K; ++j) {
      row_[2 * j] = y[j];
      row_[2 * j + 1] = y[at_.kp + j];
    }
    out.put(t, row_);
  }

  void forward(int64_t p, int64_t u) {
    const int64_t total = at_.token_count(u);
    if (keep_) {
      return at_.tokens(u, 0, total, [&](int64_t, int64_t b, int64_t t) {
        at_.read_x(b, t, x_);
        keep_rows(p, x_, row_);
        Rows<S>(args_.y, b, h_, args_.R).put(t, row_);
      });
    }
    for (int64_t i = 0; i < total; i += kTokens) {
      const int64_t end = smaller(total, i + kTokens);
      at_.tokens(u, i, end,
                 [&](int64_t n, int64_t b, int64_t t) { at_.read_x(b, t, x_ + n * at_.ldx); });
      Product<S> product = {args_.D, x_, at_.ldx, 1, code_ + p * at_.ldx * width_, width_};
      multiply<S>(end - i, width_, &product, 1, {y_, width_});
      at_.tokens(u, i, end,
                 [&](int64_t n, int64_t b, int64_t t) { write_features(b, t, y_ + n * width_); });
    }
  }

  // y_dj = x_d row_dj
  void keep_rows(int64_t p, const S *x, S *y) const {
    const S *row_cos = at_.row_cosines + p * at_.ldk, *row_sin = at_.row_sines + p * at_.ldk;
    const int64_t k = args_.K, rows = args_.J;
    if (rows == 2) {
      for (int64_t d = 0; d < args_.D; ++d) {
        y[2 * d] = x[d] * row_cos[d];
        y[2 * d + 1] = x[d] * row_sin[d];
      }
      return;
    }
    for (int64_t d = 0; d < args_.D; ++d, y += rows) {
      for (int64_t j = 0; j < k; ++j) {
        y[2 * j] = x[d] * row_cos[d * k + j];
        y[2 * j + 1] = x[d] * row_sin[d * k + j];
      }
      if (args_.gate) y[2 * k] = x[d] * at_.gate[d];
    }
  }

  void backward(int64_t p, int64_t u) {
    const int64_t total = at_.token_count(u);
    if (keep_) {
      return at_.tokens(u, 0, total, [&](int64_t, int64_t b, int64_t t) {
        at_.read_x(b, t, x_);
        keep_rows_adjoint(p, Rows<S>(args_.grad_y, b, h_, args_.R).get(t, row_));
        if (args_.grad_x.data) Rows<S>(args_.grad_x, b, h_, args_.D).put(t, grad_x_);
        if (args_.grad_positions) {
          for (int64_t l = 0; l < args_.L; ++l) {
            make_slopes(p, l);
            const S *y = Rows<S>(args_.grad_y, b, h_, args_.R).get(t, row_);
            double sum = 0;
            for (int64_t d = 0; d < args_.D; ++d)
              for (int64_t j = 0, i = d * args_.K; j < args_.K; ++j, ++i)
                sum += double(x_[d]) * (double(slope_cos_[i]) * y[d * args_.J + 2 * j] +
                                        double(slope_sin_[i]) * y[d * args_.J + 2 * j + 1]);
            at_.grad_position(b, t, l) = sum;
          }
        }
      });
    }
    const S *code = code_ + p * at_.ldx * width_;
    const bool many = total >= 4;
    if (args_.grad_x.data && many)
      transpose<S>(code, width_, at_.ldx, width_, code_transposed_, at_.ldx);
    for (int64_t i = 0; i < total; i += kTokens) {
      const int64_t end = smaller(total, i + kTokens), n = end - i;
      at_.tokens(u, i, end, [&](int64_t k, int64_t b, int64_t t) {
        at_.read_x(b, t, x_ + k * at_.ldx);
        read_features(b, t, y_ + k * width_);
      });
      if (args_.grad_x.data) {
        if (many) {
          Product<S> product = {width_, y_, width_, 1, code_transposed_, at_.ldx};
          multiply<S>(n, at_.ldx, &product, 1, {grad_x_, at_.ldx});
        } else {
          for (int64_t k = 0; k < n; ++k)
            for (int64_t d = 0; d < args_.D; ++d)
              grad_x_[k * at_.ldx + d] = dot<S>(y_ + k * width_, code + d * width_, width_);
        }
        at_.tokens(u, i, end, [&](int64_t k, int64_t b, int64_t t) {
          Rows<S>(args_.grad_x, b, h_, args_.D).put(t, grad_x_ + k * at_.ldx);
        });
      }
      if (parameters_) {
        Product<S> product = {n, x_, 1, at_.ldx, y_, width_};
        multiply<S>(args_.D, width_, &product, 1,
                    {code_grad_ + p * at_.ldx * width_, width_, true});
      }
      if (args_.grad_positions) {
        for (int64_t l = 0; l < args_.L; ++l) {
          make_slopes(p, l);
          make_codes(1, slope_cos_, slope_sin_, false, slope_code_);
          Product<S> product = {args_.D, x_, at_.ldx, 1, slope_code_, width_};
          multiply<S>(n, width_, &product, 1, {projected_, width_});
          at_.tokens(u, i, end, [&](int64_t k, int64_t b, int64_t t) {
            const S *by_position = projected_ + k * width_;
            at_.grad_position(b, t, l) = double(dot<S>(by_position, y_ + k * width_, width_));
          });
        }
      }
    }
  }

  // the derivative of the weighted rows by component l of the position
  void make_slopes(int64_t p, int64_t l) {
    for (int64_t i = 0; i < at_.dk; ++i) {
      const S factor = S(kTwoPi * at_.freq[l * at_.ldk + i]);
      slope_cos_[i] = -at_.row_sines[p * at_.ldk + i] * factor;
      slope_sin_[i] = at_.row_cosines[p * at_.ldk + i] * factor;
    }
  }

  // the adjoint of keep_rows: make grad_x_ from the gradient y, and add x_d y_dj to code_grad_
  void keep_rows_adjoint(int64_t p, const S *y) {
    const S *row_cos = at_.row_cosines + p * at_.ldk, *row_sin = at_.row_sines + p * at_.ldk;
    const int64_t k = args_.K;
    for (int64_t d = 0; d < args_.D; ++d, y += args_.J) {
      S *code = code_grad_ + p * at_.ldx * width_ + d * width_, total = 0;
      for (int64_t j = 0; j < k; ++j) {
        total += row_cos[d * k + j] * y[2 * j] + row_sin[d * k + j] * y[2 * j + 1];
        code[j] += x_[d] * y[2 * j];
        code[at_.kp + j] += x_[d] * y[2 * j + 1];
      }
      if (args_.gate) {
        total += at_.gate[d] * y[2 * k];
        code[k] += x_[d] * y[2 * k];
      }
      grad_x_[d] = total;
    }
  }

  void add_parameters(int64_t u, int64_t n, double *partial) {
    double *by_gain = partial, *by_phase = partial + at_.dk, *by_freq = partial + 2 * at_.dk;
    double *by_gate = partial + (2 + args_.L) * at_.dk;
    const int64_t k = args_.K, lanes = kLanes<S>;
    for (int64_t d = 0; d < args_.D; ++d) {
      // the gradient by the rows without their gains, [n, 2 kp]
      S *rows = code_grad_ + d * width_;
      int64_t ld = at_.ldx * width_;
      if (args_.noise) {
        const S *z = by_row_ + (h_ * args_.D + d) * args_.R * 2 * at_.kp;
        Product<S> product = {args_.R, rows, ld, 1, z, 2 * at_.kp};
        multiply<S>(n, 2 * at_.kp, &product, 1, {by_sine_, 2 * at_.kp});
        rows = by_sine_;
        ld = 2 * at_.kp;
      }
      for (int64_t p = 0; args_.gate && p < n; ++p) {
        by_gate[d] += double(rows[p * ld + k]);
        rows[p * ld + k] = 0;
      }
      for (int64_t j = 0; j < k; j += lanes) {
        Vec<S> gain = {}, phase = {}, phases[kPositions];
        for (int64_t p = 0; p < n; ++p) {
          const int64_t at = p * at_.ldk + d * k + j;
          Vec<S> c = load(at_.cosines + at), s = load(at_.sines + at);
          Vec<S> gc = load(rows + p * ld + j), gs = load(rows + p * ld + at_.kp + j);
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
          for (int64_t p = 0; p < n; ++p) total += phases[p] * S(at_.position(u + p)[l]);
          for (int64_t i = 0; i < count; ++i)
            by_freq[(d * k + j + i) * args_.L + l] += double(total[i]);
        }
      }
    }
  }

  const FastpeSineFeatures &args_;
  SineBlock<S> at_;
  const S *noise_, *by_row_;
  const bool parameters_, keep_;
  const int64_t width_;
  Scratch<S> code_, code_grad_, slope_code_, slope_cos_, slope_sin_, code_transposed_;
  Scratch<S> x_, grad_x_, y_, projected_, row_, by_sine_;
  int64_t h_ = 0;
};

}  // namespace
}  // namespace fastpe
