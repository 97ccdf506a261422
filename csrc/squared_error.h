// How far a prediction, its channels scaled, is from its target.
//
//   error[n] = sum_{c,p} (scale[n,c] * pred[n,c,p] - target[n,c,p])^2
//   e = scale * pred - target
//   grad_pred = 2 g[n] scale e      grad_target = -2 g[n] e      grad_scale[n,c] = 2 g[n] sum_p pred e
//
// Traffic in feature-map units (N*C*P elements): forward 2 reads; backward 2 reads and 1 write per map wanted.
#pragma once

#include "row_blocks.h"

namespace maskd {

struct SquaredError {
  MapShape shape;
  Feature pred, target;
  Feature grad_pred, grad_target;  // backward; absent: not wanted
  const void* scale = nullptr;     // [N, C], compute type (float for features up to 32 bits); nullptr: 1
  void* grad_scale = nullptr;      // [N, C], compute type; nullptr: not wanted
  void* error = nullptr;           // [N], compute type; forward
  const void* grad = nullptr;      // [N], compute type; backward
  bool float64 = false;
};

// Both throw std::bad_alloc when memory ran out.
using SquaredErrorKernel = void (*)(const SquaredError&);

#define MASKD_DECLARE(isa)                          \
  namespace isa {                                   \
  void squared_error_forward(const SquaredError&);  \
  void squared_error_backward(const SquaredError&); \
  }
MASKD_DECLARE(baseline)
MASKD_DECLARE(avx2)
MASKD_DECLARE(avx512)
#undef MASKD_DECLARE

}  // namespace maskd
