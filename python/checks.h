// What Python hands over, checked: a mistake there raises here and cannot read or write past anybody's memory.
#pragma once

#include <stdexcept>
#include <string>
#include <tuple>

#include "common.h"
#include "row_blocks.h"

namespace maskd {

// (address, dtype code, elements) of contiguous memory; no elements: absent
using BufferTuple = std::tuple<uintptr_t, int, int64_t>;
using Triple = std::tuple<int64_t, int64_t, int64_t>;
// (address, dtype code, shape, strides, elements from the address to the end of its memory); no channels: absent
using FeatureTuple = std::tuple<uintptr_t, int, Triple, Triple, int64_t>;

constexpr int kFloat32 = 0, kFloat64 = 1, kInt64 = 4;  // codes of maskd_kernels/native.py

inline void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

inline int compute_code(bool float64) { return float64 ? kFloat64 : kFloat32; }

inline void require(bool holds, const char* name, const std::string& message) {
  if (!holds) throw std::invalid_argument(std::string(name) + ": " + message);
}

inline DType checked_dtype(int code, const char* name) {
  require(code >= 0 && code <= int(DType::bfloat16), name, "unknown dtype code " + std::to_string(code));
  return DType(code);
}

// Memory of exactly `count` elements of this type.
inline void* required(const BufferTuple& buffer, const char* name, int64_t count, int code) {
  const auto [address, held, elements] = buffer;
  if (elements != count || (count > 0 && (held != code || address == 0)))
    throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(count) + " elements of dtype code " +
                                std::to_string(code) + ", got " + std::to_string(elements) + " of " +
                                std::to_string(held) + (address ? "" : " at no address"));
  return pointer(address);
}

// The same, or nothing.
inline void* wanted(const BufferTuple& buffer, const char* name, int64_t count, int code) {
  return std::get<2>(buffer) == 0 ? nullptr : required(buffer, name, count, code);
}

inline bool is_given(const FeatureTuple& tuple) { return std::get<1>(std::get<2>(tuple)) > 0; }

inline int64_t elements_of(const MapShape& shape) { return shape.batch * shape.channels * shape.pixels; }

inline void check_shape(const MapShape& shape) {
  require(shape.batch >= 0 && shape.channels >= 0 && shape.pixels >= 0, "shape", "expected no negative size");
}

// A map of this shape with its dense axis dense, inside its memory; of a written one no two elements share a place.
inline Feature feature(const FeatureTuple& tuple, const char* name, const MapShape& shape, bool float64,
                       bool written = false) {
  const auto& [address, code, sizes, strides, available] = tuple;
  const auto [n, c, p] = sizes;
  Feature f;
  f.data = pointer(address), f.dtype = checked_dtype(code, name);
  std::tie(f.stride_n, f.stride_c, f.stride_p) = strides;
  if (n != shape.batch || c != shape.channels || p != shape.pixels)
    throw std::invalid_argument(std::string(name) + ": expected [" + std::to_string(shape.batch) + ", " +
                                std::to_string(shape.channels) + ", " + std::to_string(shape.pixels) + "], got [" +
                                std::to_string(n) + ", " + std::to_string(c) + ", " + std::to_string(p) + "]");
  require((f.dtype == DType::float64) == float64, name, float64 ? "expected float64" : "expected no float64");
  if (elements_of(shape) == 0) return f;
  require(address != 0, name, "expected an address, got none");
  const int64_t dense = shape.interleaved ? c : p, rest = shape.interleaved ? p : c;
  const int64_t dense_stride = shape.interleaved ? f.stride_c : f.stride_p;
  const int64_t rest_stride = shape.interleaved ? f.stride_p : f.stride_c;
  require(dense == 1 || dense_stride == 1, name,
          shape.interleaved ? "expected dense channels" : "expected dense pixels");
  require(f.stride_n >= 0 && rest_stride >= 0, name, "expected no negative stride");
  const int64_t image = (rest - 1) * rest_stride + dense;  // from its first element to its last
  require((n - 1) * f.stride_n + image <= available, name, "reaches past its memory");
  require(!written || ((rest == 1 || rest_stride >= dense) && (n == 1 || f.stride_n >= image)), name,
          "expected a place for each element");
  return f;
}

// The same, or nothing.
inline Feature optional_feature(const FeatureTuple& tuple, const char* name, const MapShape& shape, bool float64,
                                bool written = false) {
  return is_given(tuple) ? feature(tuple, name, shape, float64, written) : Feature();
}

}  // namespace maskd
