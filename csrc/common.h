// What every kernel here shares: strided features, 64-byte vectors, and conversion from and to the
// storage types. No Python, no Torch: the callers pass addresses, shapes and strides they have checked.
//
// A kernel's source is compiled once per instruction set (see isa.h), so everything below lives in an
// anonymous namespace: with internal linkage the linker can never hand one build's code to another.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace maskd {

enum class DType : int { float32 = 0, float64 = 1, float16 = 2, bfloat16 = 3 };

// A feature map seen as [N, C, P]. Strides count elements. Exactly one axis is dense: pixels
// (stride_p == 1, "planar": NCHW) or channels (stride_c == 1, "interleaved": channels-last, token sequences).
struct Feature {
  void* data = nullptr;  // nullptr: absent
  DType dtype = DType::float32;
  int64_t stride_n = 0, stride_c = 0, stride_p = 0;

  __attribute__((always_inline)) bool present() const { return data != nullptr; }
};

namespace {

#define MASKD_INLINE inline __attribute__((always_inline))

constexpr int64_t kVectorBytes = 64;
constexpr int64_t kPiece = 1024;              // elements of a long row that are staged in the L1 cache
constexpr int64_t kStreamBytes = 4 << 20;     // results from this size on bypass the caches
constexpr int64_t kSerialElements = 1 << 15;  // below it, waking other threads costs more than it gains

template <typename T>
constexpr int64_t kLanes = kVectorBytes / int64_t(sizeof(T));

template <typename T, typename = std::enable_if_t<std::is_floating_point_v<T>>>
struct VectorTypes {
  typedef T Aligned __attribute__((vector_size(64)));
  typedef T Unaligned __attribute__((vector_size(64), aligned(2), may_alias));  // also what holds pairs of halves
};
template <typename T>
using Vec = typename VectorTypes<T>::Aligned;
template <typename T>
using UnalignedVec = typename VectorTypes<T>::Unaligned;

template <typename T>
MASKD_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const UnalignedVec<T>*>(p);
}

template <typename T>
MASKD_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<UnalignedVec<T>*>(p) = v;
}

template <typename T>
void add_run(T* to, const T* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

template <typename T>
MASKD_INLINE T horizontal_sum(Vec<T> v) {
  T lanes[kLanes<T>];
  store<T>(lanes, v);
  for (int64_t half = kLanes<T> / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// sums[i] = the sum of v[i]'s lanes, for eight vectors at once: a tree that halves the lanes and pairs the vectors.
MASKD_INLINE void lane_sums(const Vec<float>* v, float* sums) {
  Vec<float> half[4], quarter[2];
  for (int i = 0; i < 4; ++i) {
    const Vec<float> x = v[2 * i], y = v[2 * i + 1];
    half[i] = __builtin_shufflevector(x, y, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
              __builtin_shufflevector(x, y, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
  for (int i = 0; i < 2; ++i) {
    const Vec<float> x = half[2 * i], y = half[2 * i + 1];
    quarter[i] = __builtin_shufflevector(x, y, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
                 __builtin_shufflevector(x, y, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  }
  const Vec<float> x = quarter[0], y = quarter[1];
  const Vec<float> pairs = __builtin_shufflevector(x, y, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                           __builtin_shufflevector(x, y, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  const int lane[8] = {0, 8, 4, 12, 2, 10, 6, 14};
  for (int i = 0; i < 8; ++i) sums[i] = pairs[lane[i]] + pairs[lane[i] + 1];
}

MASKD_INLINE void lane_sums(const Vec<double>* v, double* sums) {
  for (int i = 0; i < 8; ++i) sums[i] = horizontal_sum<double>(v[i]);
}

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// 1 / (1 + exp(-x)). exp by the Cephes polynomial: below 2 units in the last place over the clamped range, NaN kept.
MASKD_INLINE Vec<float> sigmoid(Vec<float> x) {
  typedef int32_t IntVec __attribute__((vector_size(64)));
  Vec<float> y = -x;
  y = y > 88.3f ? 88.3f - Vec<float>{} : y;
  y = y < -87.3f ? -87.3f - Vec<float>{} : y;
  const float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  const Vec<float> n = (y * 1.44269504088896341f + to_integer) - to_integer;
  Vec<float> r = y - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec<float> poly = r * 1.9875691500e-4f + 1.3981999507e-3f;
  poly = poly * r + 8.3334519073e-3f;
  poly = poly * r + 4.1665795894e-2f;
  poly = poly * r + 1.6666665459e-1f;
  poly = poly * r + 5.0000001201e-1f;
  poly = poly * r * r + r + 1.0f;
  const IntVec exponent = (__builtin_convertvector(n, IntVec) + 127) << 23;
  return 1.0f / (1.0f + poly * reinterpret_cast<Vec<float>>(exponent));
}

MASKD_INLINE Vec<double> sigmoid(Vec<double> x) {
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = 1.0 / (1.0 + std::exp(-x[i]));
  return x;
}

MASKD_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

MASKD_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

MASKD_INLINE float half_to_float(uint16_t h) {
  const uint32_t magnitude = (h & 0x7fffu) << 13;
  const uint32_t infinite_or_nan = (h & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  const float scaled = bits_to_float(magnitude) * bits_to_float(0x77800000u);  // times 2^112: moves the exponent's bias
  return bits_to_float(float_to_bits(scaled) | infinite_or_nan | uint32_t(h & 0x8000u) << 16);
}

MASKD_INLINE uint16_t float_to_half(float value) {  // round to nearest, ties to even
  const uint32_t bits = float_to_bits(value), sign = bits & 0x80000000u, magnitude = bits ^ sign;
  const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;  // exponent rebiased by -112
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t half = magnitude >= 0x47800000u ? special : magnitude < 0x38800000u ? subnormal : normal;
  return uint16_t(half | sign >> 16);
}

MASKD_INLINE float bfloat_to_float(uint16_t b) { return bits_to_float(uint32_t(b) << 16); }

MASKD_INLINE uint16_t float_to_bfloat(float value) {  // round to nearest, ties to even
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// What the storage types hold, as types.
struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

MASKD_INLINE float value_of(Half x) { return half_to_float(x.bits); }
MASKD_INLINE float value_of(BFloat x) { return bfloat_to_float(x.bits); }
template <typename T>
MASKD_INLINE T value_of(T x) {
  return x;
}

typedef uint16_t NarrowVec __attribute__((vector_size(32)));
typedef uint16_t StoredVec __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint32_t BitsVec __attribute__((vector_size(64)));

MASKD_INLINE Vec<float> load(const BFloat* p) {
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(*reinterpret_cast<const StoredVec*>(p), BitsVec) << 16);
}

MASKD_INLINE Vec<float> load(const Half* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(
      _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#else
  Vec<float> value;
  for (int64_t i = 0; i < kLanes<float>; ++i) value[i] = value_of(p[i]);
  return value;
#endif
}

// bfloat16 in the upper half of each lane, rounded to nearest, ties to even.
MASKD_INLINE BitsVec rounded_to_bfloat(Vec<float> v) {
  const BitsVec bits = reinterpret_cast<BitsVec>(v), rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return v == v ? rounded : 0x7fc00000u - BitsVec{};
}

MASKD_INLINE NarrowVec narrow(Vec<float> v, BFloat) {
  const BitsVec result = rounded_to_bfloat(v) >> 16;
#if defined(__AVX512F__)
  return reinterpret_cast<NarrowVec>(_mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(result)));
#else
  return __builtin_convertvector(result, NarrowVec);
#endif
}

MASKD_INLINE NarrowVec narrow(Vec<float> v, Half) {
#if defined(__AVX512F__)
  return reinterpret_cast<NarrowVec>(
      _mm512_maskz_cvtps_ph(0xffff, __m512(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  NarrowVec stored;
  for (int64_t i = 0; i < kLanes<float>; ++i) stored[i] = float_to_half(v[i]);
  return stored;
#endif
}

template <typename Stored>
using IfHalf = std::enable_if_t<sizeof(Stored) == 2>;

template <typename Stored, typename = IfHalf<Stored>>
MASKD_INLINE void store(Stored* p, Vec<float> v) {
  *reinterpret_cast<StoredVec*>(p) = narrow(v, Stored{});
}

MASKD_INLINE void put(float* p, float value) { *p = value; }
MASKD_INLINE void put(double* p, double value) { *p = value; }
MASKD_INLINE void put(BFloat* p, float value) { p->bits = float_to_bfloat(value); }
MASKD_INLINE void put(Half* p, float value) { p->bits = float_to_half(value); }

MASKD_INLINE int64_t size_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

template <typename T>
constexpr DType kDType = sizeof(T) == 8 ? DType::float64 : DType::float32;

// visit(memory of the features as what they hold) for features of one storage type.
template <typename T, typename Visit>
MASKD_INLINE void as_stored(const Feature& feature, Visit visit) {
  if (feature.dtype == kDType<T>) return visit(static_cast<const T*>(feature.data));
  if constexpr (sizeof(T) == sizeof(float)) {
    if (feature.dtype == DType::float16) return visit(static_cast<const Half*>(feature.data));
    if (feature.dtype == DType::bfloat16) return visit(static_cast<const BFloat*>(feature.data));
  }
}

// `count` consecutive elements from `offset` on as T: the memory itself where it already holds T, else converted into
// `buffer`. float64 is only ever met with T = double (the callers convert mixed inputs first).
template <typename T>
MASKD_INLINE const T* read_run(const Feature& feature, int64_t offset, int64_t count, T* buffer) {
  if (feature.dtype == kDType<T>) return static_cast<const T*>(feature.data) + offset;
  const uint16_t* source = static_cast<const uint16_t*>(feature.data) + offset;
  if (feature.dtype == DType::float16) {
    for (int64_t i = 0; i < count; ++i) buffer[i] = T(half_to_float(source[i]));
  } else {
    for (int64_t i = 0; i < count; ++i) buffer[i] = T(bfloat_to_float(source[i]));
  }
  return buffer;
}

// Starts loading a run that is read soon: where the work between two runs hides the next from the processor.
MASKD_INLINE void prefetch_run(const Feature& feature, int64_t offset, int64_t count) {
  const char* memory = static_cast<const char*>(feature.data) + offset * size_of(feature.dtype);
  for (int64_t i = 0; i < count * size_of(feature.dtype); i += kVectorBytes) __builtin_prefetch(memory + i);
}

// Stores past the caches; p lies on a boundary of the vector's size.
template <typename V>
MASKD_INLINE void stream_whole(void* p, const V& v) {
#if defined(__AVX512F__)
  if constexpr (sizeof v == 64)
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<const __m512i&>(v));
#endif
#if defined(__AVX__)
  if constexpr (sizeof v == 32)
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<const __m256i&>(v));
#endif
#if defined(__SSE2__)
  __m128i parts[sizeof v / sizeof(__m128i)];
  std::memcpy(parts, &v, sizeof v);
  for (const __m128i& part : parts) _mm_stream_si128(reinterpret_cast<__m128i*>(p) + (&part - parts), part);
#else
  std::memcpy(p, &v, sizeof v);
#endif
}

template <typename T>
MASKD_INLINE void stream_vector(T* p, Vec<T> v) {
  stream_whole(p, v);
}

template <typename Stored, typename = IfHalf<Stored>>
MASKD_INLINE void stream_vector(Stored* p, Vec<float> v) {
  stream_whole(p, narrow(v, Stored{}));
}

// How many elements lie before the next vector boundary.
template <typename T>
MASKD_INLINE int64_t elements_to_boundary(const T* p) {
  return (-reinterpret_cast<intptr_t>(p) & (kVectorBytes - 1)) / int64_t(sizeof(T));
}

// Two vectors of consecutive elements. Of bfloat16 the first takes those at even positions and the second those at odd
// ones: taking neighbours apart costs more than what is computed with them.
template <typename Stored, typename T>
MASKD_INLINE void load_pair(const Stored* p, Vec<T>& first, Vec<T>& second) {
  if constexpr (std::is_same_v<Stored, BFloat>) {
    const BitsVec both = reinterpret_cast<BitsVec>(load(reinterpret_cast<const float*>(p)));
    first = reinterpret_cast<Vec<float>>(both << 16), second = reinterpret_cast<Vec<float>>(both & 0xffff0000u);
  } else {
    first = load(p), second = load(p + kLanes<T>);
  }
}

// The opposite; past the caches where wanted, and then p lies on a vector boundary.
template <bool kStream, typename Stored, typename V>
MASKD_INLINE void write_pair(Stored* p, V first, V second) {
  if constexpr (std::is_same_v<Stored, BFloat>) {
    const BitsVec both = (rounded_to_bfloat(first) >> 16) | (rounded_to_bfloat(second) & 0xffff0000u);
    float* to = reinterpret_cast<float*>(p);
    if (kStream) stream_vector(to, reinterpret_cast<Vec<float>>(both));
    if (!kStream) store(to, reinterpret_cast<Vec<float>>(both));
  } else {
    constexpr int64_t L = sizeof(V) / sizeof(first[0]);
    if (kStream) stream_vector(p, first), stream_vector(p + L, second);
    if (!kStream) store(p, first), store(p + L, second);
  }
}

// Copies past the caches (non-temporal stores): for a large result that nobody reads soon, so that it is
// neither read before it is written nor displaces what is still needed.
MASKD_INLINE void stream_bytes(void* destination, const void* source, int64_t bytes) {
#if defined(__SSE2__)
  char* to = static_cast<char*>(destination);
  const char* from = static_cast<const char*>(source);
  int64_t head = -reinterpret_cast<intptr_t>(to) & (kVectorBytes - 1);
  if (head > bytes) head = bytes;
  std::memcpy(to, from, size_t(head));
  int64_t i = head;
  for (; i + kVectorBytes <= bytes; i += kVectorBytes)
    stream_vector(reinterpret_cast<float*>(to + i), load(reinterpret_cast<const float*>(from + i)));
  std::memcpy(to + i, from + i, size_t(bytes - i));
#else
  std::memcpy(destination, source, size_t(bytes));
#endif
}

MASKD_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Writes `count` elements to `feature` from `offset` on. `values` may be overwritten.
template <typename T>
MASKD_INLINE void write_run(const Feature& feature, int64_t offset, int64_t count, T* values, bool stream) {
  const int64_t bytes = count * size_of(feature.dtype);
  char* destination = static_cast<char*>(feature.data) + offset * size_of(feature.dtype);
  const void* source = values;
  uint16_t narrow[512];
  if (feature.dtype != kDType<T>) {
    // Converted piecewise, so that the staging buffer stays small whatever the run's length.
    for (int64_t start = 0; start < count; start += 512) {
      const int64_t length = count - start < 512 ? count - start : 512;
      if (feature.dtype == DType::float16) {
        for (int64_t i = 0; i < length; ++i) narrow[i] = float_to_half(float(values[start + i]));
      } else {
        for (int64_t i = 0; i < length; ++i) narrow[i] = float_to_bfloat(float(values[start + i]));
      }
      if (stream) {
        stream_bytes(destination + start * 2, narrow, length * 2);
      } else {
        std::memcpy(destination + start * 2, narrow, size_t(length * 2));
      }
    }
    return;
  }
  if (stream) {
    stream_bytes(destination, source, bytes);
  } else {
    std::memcpy(destination, source, size_t(bytes));
  }
}

}  // namespace
}  // namespace maskd
