// Random feature maps in every storage type, and what they are compared by: plain loops in double precision.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "isa.h"

namespace maskd {

using Numbers = std::vector<double>;
constexpr int kThreads = 3;
inline std::mt19937_64 generator(0);
inline int failed = 0, compared = 0;

// Multiples of 1/32 from -2 to 2: every type holds them exactly.
inline double random_value() { return double(int64_t(generator() % 129) - 64) / 32; }

// Written anew, beside the kernels' own conversions: sign, exponent and fraction of a 16-bit float.
inline double from_16_bits(uint16_t bits, int fraction_bits, int bias) {
  const int exponent = (bits & 0x7fff) >> fraction_bits, fraction = bits & ((1 << fraction_bits) - 1);
  const double magnitude = exponent == 0 ? std::ldexp(fraction, 1 - bias - fraction_bits)
                                         : std::ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits);
  return bits & 0x8000 ? -magnitude : magnitude;
}

inline uint16_t to_16_bits(double exact, int fraction_bits, int bias) {
  if (exact == 0) return 0;
  int exponent;
  const double fraction = std::frexp(std::fabs(exact), &exponent);  // in [0.5, 1)
  const int mantissa = int(std::ldexp(fraction, fraction_bits + 1)) - (1 << fraction_bits);
  return uint16_t((exact < 0 ? 0x8000 : 0) | ((exponent - 1 + bias) << fraction_bits) | mantissa);
}

inline double get(const void* memory, DType dtype, int64_t i) {
  if (dtype == DType::float64) return static_cast<const double*>(memory)[i];
  if (dtype == DType::float32) return static_cast<const float*>(memory)[i];
  const uint16_t bits = static_cast<const uint16_t*>(memory)[i];
  return dtype == DType::float16 ? from_16_bits(bits, 10, 15) : from_16_bits(bits, 7, 127);
}

inline void set(void* memory, DType dtype, int64_t i, double value) {
  if (dtype == DType::float64) {
    static_cast<double*>(memory)[i] = value;
  } else if (dtype == DType::float32) {
    static_cast<float*>(memory)[i] = float(value);
  } else {
    static_cast<uint16_t*>(memory)[i] = dtype == DType::float16 ? to_16_bits(value, 10, 15) : to_16_bits(value, 7, 127);
  }
}

// Numbers in memory of some type; what nobody writes is NaN.
struct Memory {
  DType dtype;
  int64_t count;
  std::vector<uint64_t> words;

  Memory(DType type, int64_t size) : dtype(type), count(size), words(size_t(size + 1), ~uint64_t(0)) {}
  static Memory random(DType type, int64_t size) {
    Memory memory(type, size);
    for (int64_t i = 0; i < size; ++i) set(memory.data(), type, i, random_value());
    return memory;
  }
  void* data() { return words.data(); }
  double operator[](int64_t i) const { return get(words.data(), dtype, i); }
  Numbers all() const {
    Numbers result(size_t(count), 0.0);
    for (int64_t i = 0; i < count; ++i) result[size_t(i)] = (*this)[i];
    return result;
  }
};

// A feature map [N, C, P].
struct Map {
  int64_t n, c, p;
  bool interleaved;
  Memory memory;

  Map(DType dtype, int64_t N, int64_t C, int64_t P, bool channels_last, bool filled = true)
      : n(N),
        c(C),
        p(P),
        interleaved(channels_last),
        memory(filled ? Memory::random(dtype, N * C * P) : Memory(dtype, N * C * P)) {}
  int64_t place(int64_t N, int64_t C, int64_t P) const { return N * c * p + (interleaved ? P * c + C : C * p + P); }
  double at(int64_t N, int64_t C, int64_t P) const { return memory[place(N, C, P)]; }
  Feature feature() { return {memory.data(), memory.dtype, c * p, interleaved ? 1 : p, interleaved ? c : int64_t(1)}; }
};

// What a map should hold, from value(n, c, p).
template <typename Value>
Numbers expected_map(const Map& map, Value value) {
  Numbers result(size_t(map.memory.count), 0.0);
  for (int64_t n = 0; n < map.n; ++n)
    for (int64_t c = 0; c < map.c; ++c)
      for (int64_t p = 0; p < map.p; ++p) result[size_t(map.place(n, c, p))] = value(n, c, p);
  return result;
}

inline double allowed(DType dtype) {
  return dtype == DType::float64 ? 1e-12 : dtype == DType::float32 ? 1e-5 : dtype == DType::float16 ? 1e-3 : 8e-3;
}

inline void compare(const std::string& name, const Memory& got, const Numbers& expected) {
  double largest = 1e-30, worst = 0;
  for (double x : expected) largest = std::max(largest, std::fabs(x));
  for (size_t i = 0; i < expected.size(); ++i) {
    const double difference = std::fabs(got[int64_t(i)] - expected[i]);
    if (!(difference <= worst)) worst = difference;  // NaN stays
  }
  ++compared;
  if (worst / largest <= allowed(got.dtype)) return;
  ++failed;
  std::printf("%s: error %.2e of the largest value, allowed %.2e\n", name.c_str(), worst / largest, allowed(got.dtype));
}

inline double sigmoid_of(double x) { return 1 / (1 + std::exp(-x)); }

struct Shape {
  int64_t n, c, height, width;
};

}  // namespace maskd
