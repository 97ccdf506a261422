// Sufficient statistics of masked distillation with receptive tokens (MasKD, arXiv 2205.14589), one pass over the
// features.
//
//   logit[n,k,p] = sum_c tokens[k,c] * teacher[n,c,p]
//   masks[n,k,p] = sigmoid(logit)                        (times sigmoid(tokens . student) where customized)
//   distance[n,p] = sum_c (student - teacher)^2
//   mass[n,k] = sum_p masks        error[n,k] = sum_p masks^2 * distance
//   gram[n,k,l] = sum_p masks[k] * masks[l]
//   sums[n,:,c] = sum of the teacher over: all pixels, first row, last row, first column, last column, and the four
//   corners
//
// Traffic in feature-map units (N*C*P elements): forward 2 reads; backward 2 reads and 1 write.
#pragma once

#include <cstdint>

#include "common.h"

namespace maskd {

constexpr int kTaps = 9;
constexpr int64_t kMaxTokens = 1024;  // validation.MAX_TOKENS says why

struct ReceptiveLevel {
  Feature teacher, student;            // [N, C, P]
  Feature grad_teacher, grad_student;  // backward only; absent: not wanted
  const void* tokens = nullptr;        // [K, C], compute type
  void* grad_tokens = nullptr;         // [K, C], compute type; nullptr: not wanted
  int64_t channels = 0, pixels = 0;
  bool interleaved = false;    // which axis is dense, alike in every feature of the level
  int64_t width = 0;           // columns of the image; used for the taps' sums; 0: no image
  int64_t pixel_offset = 0;    // where this level begins on the concatenated pixel axis
  int64_t channel_offset = 0;  // and on the concatenated channel axis
};

// Shapes: L levels, P the pixels and C the channels of all levels together. All in the compute type
// (float for features up to 32 bits, double for 64), contiguous. nullptr where not wanted.
struct ReceptiveStats {
  void* masks = nullptr;          // [N, K, P]
  void* teacher_masks = nullptr;  // [N, K, P]; customized masks only: the factor from the teacher
  void* distance = nullptr;       // [N, P]
  void* mass = nullptr;           // [L, N, K]
  void* error = nullptr;          // [L, N, K]
  void* gram = nullptr;           // [L, N, K, K]
  void* sums = nullptr;           // [N, 9, C]
};

struct ReceptiveProblem {
  const ReceptiveLevel* levels = nullptr;
  int64_t num_levels = 0, batch = 0, num_tokens = 0, total_pixels = 0, total_channels = 0;
  bool float64 = false;    // compute type
  bool customize = false;  // multiply the masks by the student's own
  int threads = 1;
};

// Forward: fills `out`.
// Both throw std::bad_alloc when memory ran out.
using ReceptiveForward = void (*)(const ReceptiveProblem&, const ReceptiveStats& out);
// Backward: `saved` holds the forward's masks, teacher_masks and distance; `grad` the upstream gradients
// of every statistic (nullptr: zero). Writes the levels' grad_* fields.
using ReceptiveBackward = void (*)(const ReceptiveProblem&, const ReceptiveStats& saved, const ReceptiveStats& grad);

#define MASKD_DECLARE(isa)                                                                        \
  namespace isa {                                                                                 \
  void receptive_forward(const ReceptiveProblem&, const ReceptiveStats&);                         \
  void receptive_backward(const ReceptiveProblem&, const ReceptiveStats&, const ReceptiveStats&); \
  }
MASKD_DECLARE(baseline)
MASKD_DECLARE(avx2)
MASKD_DECLARE(avx512)
#undef MASKD_DECLARE

}  // namespace maskd
