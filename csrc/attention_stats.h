// Where a feature map is strong, and its channels' means, in one read.
//
//   attention[n,p] = sum_c |x[n,c,p]| / C        mean[n,c] = sum_p x[n,c,p] / P
//   grad_x = sign(x) grad_attention / C + grad_mean / P
//
// Traffic in feature-map units (N*C*P elements): forward 1 read; backward 1 read, 1 write.
#pragma once

#include "row_blocks.h"

namespace maskd {

struct AttentionStats {
  MapShape shape;
  Feature x, grad_x;
  void* attention = nullptr;             // [N, P], compute type (float for features up to 32 bits); forward
  void* mean = nullptr;                  // [N, C], compute type; forward
  const void* grad_attention = nullptr;  // [N, P], compute type; backward; nullptr: zero
  const void* grad_mean = nullptr;       // [N, C], compute type; backward; nullptr: zero
  bool float64 = false;
};

// Both throw std::bad_alloc when memory ran out.
using AttentionStatsKernel = void (*)(const AttentionStats&);

#define MASKD_DECLARE(isa)                              \
  namespace isa {                                       \
  void attention_stats_forward(const AttentionStats&);  \
  void attention_stats_backward(const AttentionStats&); \
  }
MASKD_DECLARE(baseline)
MASKD_DECLARE(avx2)
MASKD_DECLARE(avx512)
#undef MASKD_DECLARE

}  // namespace maskd
