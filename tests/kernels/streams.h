// The kernels that need no tokens.
#pragma once

#include "maps.h"

namespace maskd {

struct Streams {
  const Kernels& kernels;
  Shape shape;
  DType dtype;
  bool interleaved;
  std::string name;

  int64_t n() const { return shape.n; }
  int64_t c() const { return shape.c; }
  int64_t p() const { return shape.height * shape.width; }
  DType compute() const { return dtype == DType::float64 ? DType::float64 : DType::float32; }
  MapShape map_shape() const { return {n(), c(), p(), interleaved, kThreads}; }
  Map map(bool filled = true) const { return Map(dtype, n(), c(), p(), interleaved, filled); }

  void scale_pixels() const {
    Map x = map(), y = map(false), grad_y = map(), grad_x = map(false);
    Memory scale = Memory::random(compute(), n() * p()), grad_scale(compute(), n() * p());
    ScalePixels call;
    call.shape = map_shape(), call.scale = scale.data(), call.float64 = dtype == DType::float64;
    call.x = x.feature(), call.y = y.feature();
    kernels.scale_pixels_forward(call);
    call.y = Feature(), call.grad_y = grad_y.feature(), call.grad_x = grad_x.feature();
    call.grad_scale = grad_scale.data();
    kernels.scale_pixels_backward(call);
    const auto s = [&](int64_t i, int64_t pixel) { return scale[i * p() + pixel]; };
    compare(name + "scale_pixels y", y.memory,
            expected_map(y, [&](auto i, auto j, auto k) { return s(i, k) * x.at(i, j, k); }));
    compare(name + "scale_pixels grad_x", grad_x.memory,
            expected_map(y, [&](auto i, auto j, auto k) { return s(i, k) * grad_y.at(i, j, k); }));
    Numbers sums(size_t(n() * p()), 0.0);
    expected_map(
        x, [&](auto i, auto j, auto k) { return sums[size_t(i * p() + k)] += x.at(i, j, k) * grad_y.at(i, j, k); });
    compare(name + "scale_pixels grad_scale", grad_scale, sums);
  }

  void squared_error() const {
    Map pred = map(), target = map(), grad_pred = map(false), grad_target = map(false);
    Memory scale = Memory::random(compute(), n() * c()), grad_scale(compute(), n() * c());
    Memory error(compute(), n()), grad = Memory::random(compute(), n());
    SquaredError call;
    call.shape = map_shape(), call.scale = scale.data(), call.float64 = dtype == DType::float64;
    call.pred = pred.feature(), call.target = target.feature(), call.error = error.data();
    kernels.squared_error_forward(call);
    call.grad = grad.data(), call.grad_scale = grad_scale.data();
    call.grad_pred = grad_pred.feature(), call.grad_target = grad_target.feature();
    kernels.squared_error_backward(call);
    const auto s = [&](int64_t i, int64_t j) { return scale[i * c() + j]; };
    const auto e = [&](int64_t i, int64_t j, int64_t k) { return s(i, j) * pred.at(i, j, k) - target.at(i, j, k); };
    Numbers errors(size_t(n()), 0.0), scales(size_t(n() * c()), 0.0);
    const Numbers to_pred = expected_map(pred, [&](auto i, auto j, auto k) {
      errors[size_t(i)] += e(i, j, k) * e(i, j, k);
      scales[size_t(i * c() + j)] += 2 * grad[i] * pred.at(i, j, k) * e(i, j, k);
      return 2 * grad[i] * s(i, j) * e(i, j, k);
    });
    compare(name + "squared_error", error, errors);
    compare(name + "squared_error grad_pred", grad_pred.memory, to_pred);
    compare(name + "squared_error grad_target", grad_target.memory,
            expected_map(target, [&](auto i, auto j, auto k) { return -2 * grad[i] * e(i, j, k); }));
    compare(name + "squared_error grad_scale", grad_scale, scales);
  }

  void attention_stats() const {
    Map x = map(), grad_x = map(false);
    Memory attention(compute(), n() * p()), mean(compute(), n() * c());
    Memory grad_attention = Memory::random(compute(), n() * p()), grad_mean = Memory::random(compute(), n() * c());
    AttentionStats call;
    call.shape = map_shape(), call.float64 = dtype == DType::float64;
    call.x = x.feature(), call.attention = attention.data(), call.mean = mean.data();
    kernels.attention_stats_forward(call);
    call.grad_x = grad_x.feature();
    call.grad_attention = grad_attention.data(), call.grad_mean = grad_mean.data();
    kernels.attention_stats_backward(call);
    Numbers strength(size_t(n() * p()), 0.0), means(size_t(n() * c()), 0.0);
    const Numbers to_x = expected_map(x, [&](auto i, auto j, auto k) {
      const double value = x.at(i, j, k), sign = double(value > 0) - double(value < 0);
      strength[size_t(i * p() + k)] += std::fabs(value) / double(c());
      means[size_t(i * c() + j)] += value / double(p());
      return sign * grad_attention[i * p() + k] / double(c()) + grad_mean[i * c() + j] / double(p());
    });
    compare(name + "attention_stats attention", attention, strength);
    compare(name + "attention_stats mean", mean, means);
    compare(name + "attention_stats grad_x", grad_x.memory, to_x);
  }
};

inline void sum_taps(const Kernels& kernels, const std::string& name) {
  const int64_t height = 9, width = 7, channels = 37, kept = 20;
  Memory table = Memory::random(DType::float32, kept * 9 * channels), bias = Memory::random(DType::float32, channels);
  Memory out(DType::float32, height * width * channels);
  std::vector<int64_t> slot(size_t(height * width), -1);
  for (int64_t i = 0; i < kept; ++i) slot[size_t(3 * i)] = i;
  SumTaps call;
  call.table = static_cast<float*>(table.data()), call.slot = slot.data(), call.bias = static_cast<float*>(bias.data());
  call.out = static_cast<float*>(out.data()), call.height = height, call.width = width, call.channels = channels;
  call.threads = kThreads;
  kernels.sum_taps(call);
  Numbers expected;
  for (int64_t y = 0; y < height; ++y)
    for (int64_t x = 0; x < width; ++x)
      for (int64_t c = 0; c < channels; ++c) {
        double total = bias[c];
        for (int64_t tap = 0; tap < 9; ++tap) {
          const int64_t row = y + tap / 3 - 1, column = x + tap % 3 - 1;
          if (row < 0 || row >= height || column < 0 || column >= width) continue;
          const int64_t place = slot[size_t(row * width + column)];
          if (place >= 0) total += table[(place * 9 + tap) * channels + c];
        }
        expected.push_back(total);
      }
  compare(name + "sum_taps", out, expected);
}

inline void streaming_difference(const Kernels& kernels, const std::string& name) {
  const int64_t count = 10007;
  Memory a = Memory::random(DType::float32, count), b = Memory::random(DType::float32, count);
  Memory out(DType::float32, count);
  kernels.streaming_difference(static_cast<float*>(a.data()), static_cast<float*>(b.data()),
                               static_cast<float*>(out.data()), count, kThreads);
  Numbers expected;
  for (int64_t i = 0; i < count; ++i) expected.push_back(a[i] - b[i]);
  compare(name + "streaming_difference", out, expected);
}

}  // namespace maskd
