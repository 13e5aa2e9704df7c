// Features of SPE and F-StrIPE, and their gradient: choose the kernel and share out the work.
#pragma once
#include "coded_sines.h"
#include "projected_sines.h"

namespace fastpe {
namespace {

// add the sums of one slice, of partial_size, to the gradients of the parameters
inline void add_partial(const FastpeSineFeatures &args, int64_t h, const double *x) {
  const int64_t dk = args.D * args.K;
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

template <class S> void sine_features(const FastpeSineFeatures &args, bool backward) {
  const int64_t hd = args.H * args.D, r = args.R, rp = padded<S>(r), j = args.J;
  const Groups groups(args.positions, args.Bp * args.T, args.L, args.group);
  // no two tokens share a position
  const bool alone = args.noise && groups.size() == args.B * args.T;
  const bool parameters = wants_parameters(args);
  // the products take noise with rows of whole vectors, and transposed
  const bool pad = args.noise && rp != r;
  const bool transpose = args.noise && backward && (alone || parameters);
  const int64_t ld = alone ? ProjectedSines<S>::ld_noise(args) : 2 * SineBlock<S>::half(args);
  Scratch<S> rows(pad ? hd * j * rp : 1);
  Scratch<S> transposed(!transpose ? 1 : (alone ? args.H : hd) * r * ld);
  const S *given = as<const S>(args.noise), *noise = pad ? rows : given;
  // slices, and so the sums, do not depend on the number of threads
  const int64_t slices = smaller(16, (groups.size() + 7) / 8);
  const int64_t size = partial_size(args), units = args.H * slices;
  Scratch<double> partial(parameters ? units * size : 1);

#pragma omp parallel num_threads(args.threads)
  {
    if (pad || transpose) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < hd; ++i)
        for (int64_t row = 0; row < j; ++row) {
          const S *z = given + (i * j + row) * r;
          if (pad) copy_n(rows + (i * j + row) * rp, z, r);
          if (!transpose) continue;
          const int64_t column = alone ? ProjectedSines<S>::place(args, i % args.D, row)
                                       : CodedSines<S>::place(args, row);
          S *out = transposed + (alone ? i / args.D : i) * r * ld + column;
          for (int64_t k = 0; k < r; ++k) out[k * ld] = z[k];
        }
    }
    auto run = [&](auto &&sines) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < units; ++i) {
        const int64_t slice = i % slices, begin = groups.size() * slice / slices;
        const int64_t end = groups.size() * (slice + 1) / slices;
        sines.run(i / slices, begin, end, partial + (parameters ? i * size : 0));
      }
    };
    if (alone)
      run(ProjectedSines<S>(args, groups, noise, transposed));
    else
      run(CodedSines<S>(args, groups, noise, transposed));
  }
  for (int64_t i = 0; parameters && i < units; ++i)
    add_partial(args, i / slices, partial + i * size);
}

}  // namespace
}  // namespace fastpe
