// A feature map times one number per pixel.
//
//   y[n,c,p] = scale[n,p] * x[n,c,p]
//   grad_x = scale * grad_y        grad_scale[n,p] = sum_c x * grad_y
//
// Traffic in feature-map units (N*C*P elements): forward 1 read, 1 write; backward 1 read and 1 write for grad_x, 1
// read more for grad_scale.
#pragma once

#include "row_blocks.h"

namespace maskd {

struct ScalePixels {
  MapShape shape;
  Feature x, y;                 // forward
  Feature grad_y, grad_x;       // backward; grad_x absent: not wanted; x is read for grad_scale only
  const void* scale = nullptr;  // [N, P], compute type: float for features up to 32 bits, double for 64
  void* grad_scale = nullptr;   // [N, P], compute type; nullptr: not wanted
  bool float64 = false;
};

// Both throw std::bad_alloc when memory ran out.
using ScalePixelsKernel = void (*)(const ScalePixels&);

#define MASKD_DECLARE(isa)                        \
  namespace isa {                                 \
  void scale_pixels_forward(const ScalePixels&);  \
  void scale_pixels_backward(const ScalePixels&); \
  }
MASKD_DECLARE(baseline)
MASKD_DECLARE(avx2)
MASKD_DECLARE(avx512)
#undef MASKD_DECLARE

}  // namespace maskd
