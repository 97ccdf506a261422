// The MasKD loss with frozen tokens (arXiv 2205.14589, equations 5 and 6) and the student's gradient in one call:
//
//   loss = sum_{l,n,k} share[l,n,k] * error[l,n,k]        share = w / (C * N * (mass + eps))
//   d student = upstream * 2 * sum_k share[k] * mask[k]^2 * (student - teacher)
//
// Mass and weights come from the teacher alone (unless masks are customized), so the student is read once: the error
// and the gradient belong to the same pass. Traffic in feature-map units: 3 reads and 1 write, against 4 reads and 1
// write where the gradient waits for the loss.
#pragma once

#include "receptive_stats.h"

namespace maskd {

// Parameters of the module that weights the masks of one level, contiguous, in the compute type.
struct MaskWeighting {
  const void* conv_weight = nullptr;        // [C, C, 3, 3]
  const void* conv_bias = nullptr;          // [C]
  const void* projection_weight = nullptr;  // [K, C]
  const void* projection_bias = nullptr;    // [K]
};

struct MaskdLoss {
  ReceptiveProblem problem;                  // grad_student absent: not wanted; no other gradients
  const MaskWeighting* weighting = nullptr;  // [levels]; nullptr: w = 1 / K
  double eps = 0, upstream = 1;
  void* masks = nullptr;  // [N, K, P], out: what a later backward needs
  void* share = nullptr;  // [L, N, K], out: likewise
  void* loss = nullptr;   // [1], out
};

// Throws std::bad_alloc when memory ran out.
using MaskdLossKernel = void (*)(const MaskdLoss&);

#define MASKD_DECLARE(isa)           \
  namespace isa {                    \
  void maskd_loss(const MaskdLoss&); \
  }
MASKD_DECLARE(baseline)
MASKD_DECLARE(avx2)
MASKD_DECLARE(avx512)
#undef MASKD_DECLARE

}  // namespace maskd
