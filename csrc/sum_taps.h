// The last step of a 3x3 convolution over an image of which only some pixels are kept: each output pixel adds what the
// kept pixels around it contribute.
//
//   out[y,x,:] = bias + sum over taps (i,j) of table[slot[y+i-1,x+j-1], 3i+j, :], where a pixel is inside and kept
//
// Traffic in units of P*C elements, with a share k of the pixels kept: 9 k reads, 1 write.
#pragma once

#include "common.h"

namespace maskd {

struct SumTaps {
  const float* table = nullptr;   // [kept, 9, C]
  const int64_t* slot = nullptr;  // [H, W]; negative: not kept
  const float* bias = nullptr;    // [C]
  float* out = nullptr;           // [H, W, C]
  int64_t height = 0, width = 0, channels = 0;
  int threads = 1;
};

using SumTapsKernel = void (*)(const SumTaps&);

#define MASKD_DECLARE(isa)       \
  namespace isa {                \
  void sum_taps(const SumTaps&); \
  }
MASKD_DECLARE(baseline)
MASKD_DECLARE(avx2)
MASKD_DECLARE(avx512)
#undef MASKD_DECLARE

}  // namespace maskd
