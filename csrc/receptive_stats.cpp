// CPU kernels of receptive_stats. Compiled once per instruction set: MASKD_ISA names the namespace.
//
// Work is cut into tiles of consecutive pixels times all channels. A tile's K + 1 accumulators stay in
// the L1 cache while its channels stream by; its statistics go to a partial of its own, and the partials
// are added in a fixed order: the result does not depend on the number of threads.
#include "receptive_stats.h"

#include <cstdlib>

namespace maskd {
namespace {

constexpr int64_t kTokenChunk = 8;  // accumulators that fit the registers beside the rows
constexpr int64_t kSums = 8;        // lane sums taken at a time
constexpr int64_t kRows = 4;        // channels per step over a planar tile
constexpr int64_t kAccumulatorBytes = 48 << 10;
constexpr int64_t kStudentPixels = 1 << 15;   // pixels and channels of a tile that only needs the student's gradient:
constexpr int64_t kStudentChannels = 64;      // long rows in sequence, as a copy would read them
constexpr int64_t kPiece = 1024;              // elements of such a row that are staged in the L1 cache
constexpr int64_t kStreamBytes = 4 << 20;     // gradients from this size on bypass the caches
constexpr int64_t kSerialElements = 1 << 15;  // below it, waking other threads costs more than it gains

struct FreeDeleter {
  void* p;
  ~FreeDeleter() { std::free(p); }
};

// Bump allocator over one block; the sizes are summed up before in the same order.
struct Arena {
  char* base;
  int64_t used = 0;
  template <typename T>
  T* take(int64_t count) {
    T* p = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += round_up(count * int64_t(sizeof(T)), kVectorBytes);
    return p;
  }
};

template <typename T>
int64_t tile_pixels(const ReceptiveLevel& level, int64_t accumulators) {
  const int64_t fitting = kAccumulatorBytes / int64_t(sizeof(T)) / (accumulators + 1);
  int64_t tile = fitting / 64 * 64;
  if (tile > 2048) tile = 2048;
  if (level.interleaved && tile > 128) tile = 128;
  if (tile < 64) tile = 64;
  const int64_t whole = round_up(level.pixels, kLanes<T>);
  return tile < whole ? tile : whole;
}

// Which piece of which image of which level task number `index` is.
struct Tile {
  const ReceptiveLevel* level;
  int64_t level_index, n, begin, count, stride;  // stride: pixels per accumulator row, whole vectors
  int64_t first_channel, last_channel;
};

struct Plan {
  const ReceptiveProblem* problem;
  int64_t* first;     // [levels + 1] first task of each level
  int64_t* size;      // [levels] pixels per tile
  int64_t* tiles;     // [levels] tiles per image
  bool student_only;  // no statistics to accumulate: tiles need not hold all channels
  int64_t total = 0, max_size = 0, max_channels = 0;

  // A few tasks for each thread; more would only repeat what a tile's channels share.
  int64_t channel_block(int64_t l) const {
    const int64_t channels = problem->levels[l].channels, images = problem->batch * tiles[l];
    if (!student_only || problem->levels[l].interleaved || images == 0) return channels;
    const int64_t blocks = (2 * problem->threads + images - 1) / images;
    return blocks < channels ? (channels + blocks - 1) / blocks : 1;
  }

  // Tasks follow each other image by image.
  int64_t per_image(int64_t l) const {
    return tiles[l] * ((problem->levels[l].channels + channel_block(l) - 1) / channel_block(l));
  }

  Tile tile(int64_t index) const {
    int64_t l = 0;
    while (index >= first[l + 1]) ++l;
    const ReceptiveLevel& level = problem->levels[l];
    const int64_t local = index - first[l], n = local / per_image(l), rest = local % per_image(l);
    const int64_t begin = rest % tiles[l] * size[l], left = level.pixels - begin;
    const int64_t channel = rest / tiles[l] * channel_block(l), last = channel + channel_block(l);
    return {&level,
            l,
            n,
            begin,
            left < size[l] ? left : size[l],
            size[l],
            channel,
            last < level.channels ? last : level.channels};
  }
};

// `table`: 3 * levels + 1 integers.
template <typename T>
Plan lay_out(const ReceptiveProblem& problem, int64_t* table, int64_t accumulators, bool student_only) {
  const int64_t levels = problem.num_levels;
  Plan plan{&problem, table, table + levels + 1, table + 2 * levels + 1, student_only};
  for (int64_t l = 0; l < levels; ++l) {
    const ReceptiveLevel& level = problem.levels[l];
    int64_t size = tile_pixels<T>(level, accumulators);
    if (student_only && !level.interleaved) size = level.pixels < kStudentPixels ? level.pixels : kStudentPixels;
    size = round_up(size, kLanes<T>);
    plan.first[l] = plan.total;
    plan.size[l] = size;
    plan.tiles[l] = level.pixels == 0 ? 0 : (level.pixels + size - 1) / size;
    plan.total += problem.batch * plan.per_image(l);
    if (size > plan.max_size) plan.max_size = size;
    if (level.channels > plan.max_channels) plan.max_channels = level.channels;
  }
  plan.first[levels] = plan.total;
  return plan;
}

int worker_count(const ReceptiveProblem& problem) {
  int64_t elements = 0;
  for (int64_t l = 0; l < problem.num_levels; ++l)
    elements += problem.batch * problem.levels[l].channels * problem.levels[l].pixels;
  return elements < kSerialElements || problem.threads < 1 ? 1 : problem.threads;
}

// ---- One step: kRows channels of a planar tile -------------------------------------------------
// A tile's rows lie far apart, further than hardware prefetchers look: each step asks for the next one's.

template <typename T, int KC, bool kDistance>
MASKD_INLINE void accumulate_rows(const T* const* t, const T* const* s, const T* tokens, int64_t vectors, T* logits,
                                  int64_t stride, T* distance, Vec<T>* sums, const int64_t* ahead) {
  constexpr int64_t L = kLanes<T>;
  Vec<T> sum0 = sums[0], sum1 = sums[1], sum2 = sums[2], sum3 = sums[3];
  for (int64_t i = 0; i < vectors * L; i += L) {
    const Vec<T> t0 = load(t[0] + i), t1 = load(t[1] + i), t2 = load(t[2] + i), t3 = load(t[3] + i);
    for (int r = 0; r < kRows; ++r) __builtin_prefetch(t[r] + i + ahead[0], 0, 2);
    if (kDistance) {
      for (int r = 0; r < kRows; ++r) __builtin_prefetch(s[r] + i + ahead[1], 0, 2);
      const Vec<T> d0 = load(s[0] + i) - t0, d1 = load(s[1] + i) - t1;
      const Vec<T> d2 = load(s[2] + i) - t2, d3 = load(s[3] + i) - t3;
      store(distance + i, load(distance + i) + (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3));
    }
    sum0 += t0, sum1 += t1, sum2 += t2, sum3 += t3;
    for (int k = 0; k < KC; ++k) {
      const T* e = tokens + k * kRows;
      T* logit = logits + k * stride + i;
      store(logit, load(logit) + (e[0] * t0 + e[1] * t1) + (e[2] * t2 + e[3] * t3));
    }
  }
  sums[0] = sum0, sums[1] = sum1, sums[2] = sum2, sums[3] = sum3;
}

template <typename T, bool kDistance>
MASKD_INLINE void accumulate_chunk(int64_t chunk, const T* const* t, const T* const* s, const T* tokens,
                                   int64_t vectors, T* logits, int64_t stride, T* distance, Vec<T>* sums,
                                   const int64_t* ahead) {
#define MASKD_CASE(KC) \
  case KC:             \
    return accumulate_rows<T, KC, kDistance>(t, s, tokens, vectors, logits, stride, distance, sums, ahead)
  switch (chunk) {
    MASKD_CASE(0);
    MASKD_CASE(1);
    MASKD_CASE(2);
    MASKD_CASE(3);
    MASKD_CASE(4);
    MASKD_CASE(5);
    MASKD_CASE(6);
    MASKD_CASE(7);
    MASKD_CASE(8);
  }
#undef MASKD_CASE
}

// All tokens, in chunks. The distance, where wanted, and the channel sums ride with the first chunk.
template <typename T>
void accumulate(const T* const* t, const T* const* s, const T* tokens, int64_t num_tokens, int64_t vectors, T* logits,
                int64_t stride, T* distance, Vec<T>* sums, const int64_t* ahead) {
  Vec<T> discarded[kRows] = {};
  int64_t k = 0;
  do {
    const int64_t chunk = num_tokens - k < kTokenChunk ? num_tokens - k : kTokenChunk;
    const T* e = tokens + k * kRows;
    if (k == 0 && distance) {
      accumulate_chunk<T, true>(chunk, t, s, e, vectors, logits, stride, distance, sums, ahead);
    } else {
      accumulate_chunk<T, false>(chunk, t, s, e, vectors, logits + k * stride, stride, distance,
                                 k == 0 ? sums : discarded, ahead);
    }
    k += chunk;
  } while (k < num_tokens);
}

// Calls visit(set, i) for every pixel i of a run that lies in a border set; set 0, the total, is the caller's.
template <typename T, typename Visit>
MASKD_INLINE void visit_borders(const ReceptiveLevel& level, int64_t begin, int64_t count, Visit visit) {
  if (level.width == 0) return;
  const int64_t width = level.width, pixels = level.pixels, end = begin + count, last_row = pixels - width;
  for (int64_t p = begin; p < (end < width ? end : width); ++p) visit(1, p - begin);
  for (int64_t p = begin > last_row ? begin : last_row; p < end; ++p) visit(2, p - begin);
  for (int64_t p = round_up(begin, width); p < end; p += width) visit(3, p - begin);
  for (int64_t p = round_up(begin + 1, width) - 1; p < end; p += width) visit(4, p - begin);
  const int64_t corners[4] = {0, width - 1, last_row, pixels - 1};
  for (int corner = 0; corner < 4; ++corner)
    if (corners[corner] >= begin && corners[corner] < end) visit(5 + corner, corners[corner] - begin);
}

// While tiles are read, sums are kept of nine pixel sets: all, first row, last row, first column, last column, and the
// corners top left, top right, bottom left, bottom right. What a tap reads is everything without the row and the column
// that its shift moves out of the image. Both conversions work on one channel; entries are `stride` apart.
enum Set { kAll, kTop, kBottom, kLeft, kRight, kTopLeft, kTopRight, kBottomLeft, kBottomRight };

template <typename T>
void sets_to_taps(T* x, int64_t stride) {
  T s[kTaps];
  for (int i = 0; i < kTaps; ++i) s[i] = x[i * stride];
  const T row[3] = {s[kBottom], 0, s[kTop]}, column[3] = {s[kRight], 0, s[kLeft]};
  const T corner[3][3] = {{s[kBottomRight], 0, s[kBottomLeft]}, {0, 0, 0}, {s[kTopRight], 0, s[kTopLeft]}};
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 3; ++j) x[(3 * i + j) * stride] = s[kAll] - row[i] - column[j] + corner[i][j];
}

// The transpose: gradients of the taps' sums to gradients of the sets' sums.
template <typename T>
void taps_to_sets(const T* taps, T* sets, int64_t stride) {
  T g[3][3], row[3], column[3];
  for (int i = 0; i < kTaps; ++i) g[i / 3][i % 3] = taps[i * stride];
  for (int i = 0; i < 3; ++i) row[i] = g[i][0] + g[i][1] + g[i][2], column[i] = g[0][i] + g[1][i] + g[2][i];
  const T result[kTaps] = {
      row[0] + row[1] + row[2], -row[2], -row[0], -column[2], -column[0], g[2][2], g[2][0], g[0][2], g[0][0]};
  for (int i = 0; i < kTaps; ++i) sets[i * stride] = result[i];
}

template <typename T>
struct ForwardScratch {
  T *logits, *student_logits, *distance, *rows, *tails, *packed;

  void take(Arena& arena, const ReceptiveProblem& problem, int64_t tile, int64_t channels) {
    const int64_t run = (tile > channels ? tile : channels) + kLanes<T>;
    logits = arena.take<T>(problem.num_tokens * tile);
    student_logits = arena.take<T>(problem.customize ? problem.num_tokens * tile : 0);
    distance = arena.take<T>(tile);
    rows = arena.take<T>(2 * kRows * run);
    tails = arena.take<T>(2 * kRows * kLanes<T>);
    packed = arena.take<T>(problem.num_tokens * round_up(channels > kRows ? channels : kRows, kLanes<T>));
  }
};

// ---- Forward, planar ---------------------------------------------------------------------------

template <typename T>
void forward_planar(const ReceptiveProblem& problem, const Tile& tile, const ForwardScratch<T>& scratch, T* sums) {
  constexpr int64_t L = kLanes<T>;
  const ReceptiveLevel& level = *tile.level;
  const bool with_student = level.student.present();
  const int64_t K = problem.num_tokens, C = level.channels, whole = tile.count / L, tail = tile.count % L;
  const T* tokens = static_cast<const T*>(level.tokens);
  const Feature* features[2] = {&level.teacher, &level.student};
  const int64_t run = round_up(tile.stride, L);
  constexpr int64_t kNothingAhead[2] = {0, 0};
  int64_t ahead[2] = {0, 0};  // elements from a row to the one of the next step, where rows are read in place
  for (int f = 0; f < 2; ++f)
    if (features[f]->dtype == kDType<T>) ahead[f] = kRows * features[f]->stride_c;

  for (int64_t c = 0; c < C; c += kRows) {
    const int64_t rows = C - c < kRows ? C - c : kRows;
    const T* main_rows[2][kRows];
    const T* tail_rows[2][kRows];
    for (int f = 0; f < (with_student ? 2 : 1); ++f) {
      for (int64_t r = 0; r < kRows; ++r) {
        const int64_t channel = c + (r < rows ? r : 0);
        const int64_t offset = tile.n * features[f]->stride_n + channel * features[f]->stride_c + tile.begin;
        T* buffer = scratch.rows + (f * kRows + r) * run;
        main_rows[f][r] = read_run(*features[f], offset, tile.count, buffer);
        T* tail_row = scratch.tails + (f * kRows + r) * L;
        for (int64_t i = 0; i < L; ++i) tail_row[i] = i < tail ? main_rows[f][r][whole * L + i] : T(0);
        tail_rows[f][r] = tail_row;
      }
    }
    // The rows that stand in behind the last channel get token 0, and the teacher's row as the student's: distance 0.
    for (int64_t r = rows; with_student && r < kRows; ++r)
      main_rows[1][r] = main_rows[0][r], tail_rows[1][r] = tail_rows[0][r];
    for (int64_t k = 0; k < K; ++k)
      for (int64_t r = 0; r < kRows; ++r) scratch.packed[k * kRows + r] = r < rows ? tokens[k * C + c + r] : T(0);

    Vec<T> row_sums[kRows] = {};
    T* distance = with_student ? scratch.distance : nullptr;
    accumulate(main_rows[0], main_rows[1], scratch.packed, K, whole, scratch.logits, tile.stride, distance, row_sums,
               ahead);
    if (tail)
      accumulate(tail_rows[0], tail_rows[1], scratch.packed, K, 1, scratch.logits + whole * L, tile.stride,
                 distance ? distance + whole * L : nullptr, row_sums, kNothingAhead);
    if (problem.customize) {
      Vec<T> discarded[kRows] = {};
      accumulate<T>(main_rows[1], nullptr, scratch.packed, K, whole, scratch.student_logits, tile.stride, nullptr,
                    discarded, kNothingAhead);
      if (tail)
        accumulate<T>(tail_rows[1], nullptr, scratch.packed, K, 1, scratch.student_logits + whole * L, tile.stride,
                      nullptr, discarded, kNothingAhead);
    }
    if (sums) {
      for (int64_t r = 0; r < rows; ++r) sums[c + r] = horizontal_sum<T>(row_sums[r]);
      visit_borders<T>(level, tile.begin, tile.count, [&](int set, int64_t i) {
        for (int64_t r = 0; r < rows; ++r) sums[set * C + c + r] += main_rows[0][r][i];
      });
    }
  }
}

// ---- Forward, interleaved ----------------------------------------------------------------------

// One pixel against a chunk of tokens, and its distance: lane-wise products, to be summed by lane_sums. `channels` is
// whole vectors; token rows are `channels` apart.
template <typename T, int KC, bool kDistance>
MASKD_INLINE void multiply_tokens(const T* t, const T* s, const T* tokens, int64_t channels, Vec<T>* products) {
  constexpr int64_t L = kLanes<T>;
  Vec<T> product[kSums] = {};
  for (int64_t c = 0; c < channels; c += L) {
    const Vec<T> v = load(t + c);
    for (int k = 0; k < KC; ++k) product[k] += v * load(tokens + k * channels + c);
    if (kDistance) {
      const Vec<T> d = load(s + c) - v;
      product[KC] += d * d;
    }
  }
  for (int i = 0; i < kSums; ++i) products[i] = product[i];
}

// logits[k * stride] = tokens[k] . t, and distance[0] = |s - t|^2 where a distance is wanted.
template <typename T>
void dot_tokens(const T* t, const T* s, const T* tokens, int64_t num_tokens, int64_t channels, T* logits,
                int64_t stride, T* distance) {
  int64_t k = 0;
  do {
    const int64_t chunk = num_tokens - k < kSums - 1 ? num_tokens - k : kSums - 1;
    const T* e = tokens + k * channels;
    Vec<T> products[kSums] = {};
#define MASKD_CASE(KC)                                            \
  case KC:                                                        \
    if (distance)                                                 \
      multiply_tokens<T, KC, true>(t, s, e, channels, products);  \
    else                                                          \
      multiply_tokens<T, KC, false>(t, s, e, channels, products); \
    break
    switch (chunk) {
      MASKD_CASE(0);
      MASKD_CASE(1);
      MASKD_CASE(2);
      MASKD_CASE(3);
      MASKD_CASE(4);
      MASKD_CASE(5);
      MASKD_CASE(6);
      MASKD_CASE(7);
    }
#undef MASKD_CASE
    T sums[kSums];
    lane_sums(products, sums);
    for (int64_t i = 0; i < chunk; ++i) logits[(k + i) * stride] = sums[i];
    if (distance) *distance = sums[chunk];
    distance = nullptr;
    k += chunk;
  } while (k < num_tokens);
}

template <typename T>
void add_run(T* to, const T* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

// The run itself where it is whole vectors, else a copy with zeros behind it.
template <typename T>
MASKD_INLINE const T* whole_vectors(const T* run, int64_t count, T* buffer) {
  if (count % kLanes<T> == 0) return run;
  if (run != buffer) std::memcpy(buffer, run, size_t(count) * sizeof(T));
  for (int64_t i = count; i < round_up(count, kLanes<T>); ++i) buffer[i] = T(0);
  return buffer;
}

template <typename T>
void forward_interleaved(const ReceptiveProblem& problem, const Tile& tile, const ForwardScratch<T>& scratch, T* sums) {
  const ReceptiveLevel& level = *tile.level;
  const int64_t K = problem.num_tokens, C = level.channels, padded = round_up(C, kLanes<T>);
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t c = 0; c < padded; ++c)
      scratch.packed[k * padded + c] = c < C ? static_cast<const T*>(level.tokens)[k * C + c] : T(0);
  }
  T* student_buffer = scratch.rows + padded;
  const bool with_student = level.student.present();

  for (int64_t i = 0; i < tile.count; ++i) {
    const int64_t p = tile.begin + i;
    const T* t = read_run(level.teacher, tile.n * level.teacher.stride_n + p * level.teacher.stride_p, C, scratch.rows);
    t = whole_vectors(t, C, scratch.rows);
    const T* s = nullptr;
    if (with_student) {
      s = read_run(level.student, tile.n * level.student.stride_n + p * level.student.stride_p, C, student_buffer);
      s = whole_vectors(s, C, student_buffer);
    }
    dot_tokens(t, s, scratch.packed, K, padded, scratch.logits + i, tile.stride,
               with_student ? scratch.distance + i : nullptr);
    if (problem.customize)
      dot_tokens<T>(s, nullptr, scratch.packed, K, padded, scratch.student_logits + i, tile.stride, nullptr);
    if (sums) {
      add_run(sums, t, C);
      visit_borders<T>(level, p, 1, [&](int set, int64_t) { add_run(sums + set * C, t, C); });
    }
  }
}

// ---- Forward: masks and their statistics -------------------------------------------------------

template <typename T>
void finish_tile(const ReceptiveProblem& problem, const Tile& tile, const ForwardScratch<T>& scratch,
                 const ReceptiveStats& out, double* partial) {
  constexpr int64_t L = kLanes<T>;
  const int64_t K = problem.num_tokens, padded = round_up(tile.count, L), P = problem.total_pixels;
  const int64_t column = tile.level->pixel_offset + tile.begin;
  double *mass = partial, *error = mass + K, *gram = error + K;

  for (int64_t k = 0; k < K; ++k) {
    T* mask = scratch.logits + k * tile.stride;
    for (int64_t i = 0; i < padded; i += L) store(mask + i, sigmoid(load(mask + i)));
    for (int64_t i = tile.count; i < padded; ++i) mask[i] = T(0);
    const int64_t row = (tile.n * K + k) * P + column;
    if (out.teacher_masks) std::memcpy(static_cast<T*>(out.teacher_masks) + row, mask, size_t(tile.count) * sizeof(T));
    if (problem.customize) {
      const T* factor = scratch.student_logits + k * tile.stride;
      for (int64_t i = 0; i < padded; i += L) store(mask + i, load(mask + i) * sigmoid(load(factor + i)));
    }
    std::memcpy(static_cast<T*>(out.masks) + row, mask, size_t(tile.count) * sizeof(T));

    Vec<T> mass_sum{}, error_sum{};
    for (int64_t i = 0; i < padded; i += L) {
      const Vec<T> m = load(mask + i);
      mass_sum += m;
      if (out.error) error_sum += m * m * load(scratch.distance + i);
    }
    mass[k] = double(horizontal_sum<T>(mass_sum));
    error[k] = double(horizontal_sum<T>(error_sum));
  }
  if (out.gram) {
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t l = 0; l <= k; ++l) {
        Vec<T> sum{};
        for (int64_t i = 0; i < padded; i += L)
          sum += load(scratch.logits + k * tile.stride + i) * load(scratch.logits + l * tile.stride + i);
        *gram++ = double(horizontal_sum<T>(sum));
      }
    }
  }
  if (out.distance)
    std::memcpy(static_cast<T*>(out.distance) + tile.n * P + column, scratch.distance, size_t(tile.count) * sizeof(T));
}

// Adds the partials of image n of level l, in order.
template <typename T>
void reduce_image(const Plan& plan, int64_t l, int64_t n, const double* partials, int64_t partial_size, const T* sums,
                  int64_t sums_size, const ReceptiveStats& out) {
  const ReceptiveProblem& problem = *plan.problem;
  const ReceptiveLevel& level = problem.levels[l];
  const int64_t K = problem.num_tokens, C = level.channels, tiles = plan.tiles[l];
  const int64_t first = plan.first[l] + n * tiles, row = l * problem.batch + n;
  const auto total = [&](int64_t entry) {
    double value = 0;
    for (int64_t i = 0; i < tiles; ++i) value += partials[(first + i) * partial_size + entry];
    return T(value);
  };
  for (int64_t k = 0; k < K; ++k) {
    static_cast<T*>(out.mass)[row * K + k] = total(k);
    if (out.error) static_cast<T*>(out.error)[row * K + k] = total(K + k);
  }
  if (out.gram) {
    T* gram = static_cast<T*>(out.gram) + row * K * K;
    int64_t entry = 2 * K;
    for (int64_t k = 0; k < K; ++k)
      for (int64_t m = 0; m <= k; ++m, ++entry) gram[k * K + m] = gram[m * K + k] = total(entry);
  }
  if (out.sums) {
    T* destination = static_cast<T*>(out.sums) + n * kTaps * problem.total_channels + level.channel_offset;
    const int sets = level.width > 0 ? kTaps : 1;
    for (int set = 0; set < kTaps; ++set) {
      T* row_out = destination + set * problem.total_channels;
      for (int64_t c = 0; c < C; ++c) row_out[c] = T(0);
      for (int64_t i = 0; set < sets && i < tiles; ++i) add_run(row_out, sums + (first + i) * sums_size + set * C, C);
    }
    for (int64_t c = 0; c < C; ++c) sets_to_taps(destination + c, problem.total_channels);
  }
}

template <typename T>
bool forward(const ReceptiveProblem& problem, const ReceptiveStats& out) {
  const int64_t K = problem.num_tokens;
  int64_t* table = static_cast<int64_t*>(std::malloc(size_t(3 * problem.num_levels + 1) * sizeof(int64_t)));
  FreeDeleter free_table{table};
  if (!table) return false;
  const Plan plan = lay_out<T>(problem, table, problem.customize ? 2 * K : K, false);

  const int threads = worker_count(problem);
  const int64_t partial_size = 2 * K + K * (K + 1) / 2;
  const int64_t sums_size = out.sums ? kTaps * plan.max_channels : 0;
  Arena measure{nullptr};
  ForwardScratch<T>{}.take(measure, problem, plan.max_size, plan.max_channels);
  const int64_t scratch_bytes = measure.used;
  Arena sizes{nullptr};
  sizes.take<double>(plan.total * partial_size);
  sizes.take<T>(plan.total * sums_size);
  sizes.take<char>(threads * scratch_bytes);
  void* block = std::malloc(size_t(sizes.used) + kVectorBytes);
  FreeDeleter free_block{block};
  if (!block) return false;
  Arena arena{static_cast<char*>(block) + (-reinterpret_cast<intptr_t>(block) & (kVectorBytes - 1))};
  double* partials = arena.take<double>(plan.total * partial_size);
  T* sums = arena.take<T>(plan.total * sums_size);
  char* scratch_base = arena.take<char>(threads * scratch_bytes);

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static, 1)
    for (int thread = 0; thread < threads; ++thread) {
      // Even shares by interleaving: thread t takes every threads-th tile, so that neighbours are read together.
      Arena own{scratch_base + thread * scratch_bytes};
      ForwardScratch<T> scratch{};
      scratch.take(own, problem, plan.max_size, plan.max_channels);
      for (int64_t task = thread; task < plan.total; task += threads) {
        const Tile tile = plan.tile(task);
        const int64_t cleared = K * tile.stride * int64_t(sizeof(T));
        std::memset(scratch.logits, 0, size_t(cleared));
        if (problem.customize) std::memset(scratch.student_logits, 0, size_t(cleared));
        std::memset(scratch.distance, 0, size_t(tile.stride) * sizeof(T));
        T* tile_sums = out.sums ? sums + task * sums_size : nullptr;
        if (tile_sums) std::memset(tile_sums, 0, size_t(sums_size) * sizeof(T));
        if (tile.level->interleaved) {
          forward_interleaved(problem, tile, scratch, tile_sums);
        } else {
          forward_planar(problem, tile, scratch, tile_sums);
        }
        finish_tile(problem, tile, scratch, out, partials + task * partial_size);
      }
    }
#pragma omp for schedule(static)
    for (int64_t image = 0; image < problem.num_levels * problem.batch; ++image)
      reduce_image(plan, image / problem.batch, image % problem.batch, partials, partial_size, sums, sums_size, out);
  }
  return true;
}

// ---- Backward ----------------------------------------------------------------------------------

template <typename T>
struct BackwardScratch {
  T *coefficient, *grad_logits, *student_row, *teacher_row, *grad_row, *result_row;

  void take(Arena& arena, const ReceptiveProblem& problem, int64_t tile, int64_t channels) {
    const int64_t run = round_up(tile > channels ? tile : channels, kLanes<T>);
    coefficient = arena.take<T>(tile);
    grad_logits = arena.take<T>(problem.num_tokens * tile);
    student_row = arena.take<T>(run);
    teacher_row = arena.take<T>(run);
    grad_row = arena.take<T>(run);
    result_row = arena.take<T>(run);
  }
};

// coefficient[p] = 2 * (sum_k g_error[k] * mask[k,p]^2 + g_distance[p]), so that d student = coefficient * (student -
// teacher).
template <typename T>
void student_coefficient(const ReceptiveProblem& problem, const Tile& tile, const ReceptiveStats& saved,
                         const ReceptiveStats& grad, T* coefficient) {
  const int64_t K = problem.num_tokens, P = problem.total_pixels, column = tile.level->pixel_offset + tile.begin;
  const T* distance_grad = static_cast<const T*>(grad.distance);
  const T* error_grad = static_cast<const T*>(grad.error);
  if (error_grad) error_grad += (tile.level_index * problem.batch + tile.n) * K;
  for (int64_t begin = 0; begin < tile.count; begin += kPiece) {
    const int64_t count = tile.count - begin < kPiece ? tile.count - begin : kPiece;
    T* piece = coefficient + begin;
    for (int64_t i = 0; i < count; ++i)
      piece[i] = distance_grad ? 2 * distance_grad[tile.n * P + column + begin + i] : T(0);
    for (int64_t k = 0; error_grad && k < K; ++k) {
      const T* mask = static_cast<const T*>(saved.masks) + (tile.n * K + k) * P + column + begin;
      const T factor = 2 * error_grad[k];
      for (int64_t i = 0; i < count; ++i) piece[i] += factor * mask[i] * mask[i];
    }
  }
}

// grad_logits[k,p] = M (1 - M_T) (g_mass + 2 g_error M D + sum_l (g_gram + g_gram^T)[k,l] M_l + g_masks).
template <typename T>
void token_logit_gradients(const ReceptiveProblem& problem, const Tile& tile, const ReceptiveStats& saved,
                           const ReceptiveStats& grad, T* grad_logits) {
  const int64_t K = problem.num_tokens, P = problem.total_pixels, column = tile.level->pixel_offset + tile.begin;
  const int64_t image = tile.level_index * problem.batch + tile.n;
  const T* masks = static_cast<const T*>(saved.masks) + tile.n * K * P + column;
  const T* teacher_masks =
      problem.customize ? static_cast<const T*>(saved.teacher_masks) + tile.n * K * P + column : masks;
  const T* distance = grad.error ? static_cast<const T*>(saved.distance) + tile.n * P + column : nullptr;
  for (int64_t k = 0; k < K; ++k) {
    const T* mask = masks + k * P;
    const T* teacher_mask = teacher_masks + k * P;
    T* row = grad_logits + k * tile.stride;
    const T mass_grad = grad.mass ? static_cast<const T*>(grad.mass)[image * K + k] : T(0);
    for (int64_t i = 0; i < tile.count; ++i) row[i] = mass_grad;
    if (grad.error) {
      const T factor = 2 * static_cast<const T*>(grad.error)[image * K + k];
      for (int64_t i = 0; i < tile.count; ++i) row[i] += factor * mask[i] * distance[i];
    }
    if (grad.gram) {
      const T* gram = static_cast<const T*>(grad.gram) + image * K * K;
      for (int64_t l = 0; l < K; ++l) {
        const T factor = gram[k * K + l] + gram[l * K + k];
        for (int64_t i = 0; i < tile.count; ++i) row[i] += factor * masks[l * P + i];
      }
    }
    if (grad.masks) add_run(row, static_cast<const T*>(grad.masks) + (tile.n * K + k) * P + column, tile.count);
    for (int64_t i = 0; i < tile.count; ++i) row[i] *= mask[i] * (1 - teacher_mask[i]);
    for (int64_t i = tile.count; i < round_up(tile.count, kLanes<T>); ++i) row[i] = T(0);
  }
}

template <typename T>
MASKD_INLINE T dot_run(const T* a, const T* b, int64_t count) {
  constexpr int64_t L = kLanes<T>;
  Vec<T> sum{};
  int64_t i = 0;
  for (; i + L <= count; i += L) sum += load(a + i) * load(b + i);
  T total = horizontal_sum<T>(sum);
  for (; i < count; ++i) total += a[i] * b[i];
  return total;
}

template <typename T>
MASKD_INLINE void add_scaled_run(T* to, const T* from, T factor, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += factor * from[i];
}

// A run is what lies dense in memory: one channel's pixels of the tile (planar) or one pixel's channels (interleaved).
template <typename T>
struct BackwardTile {
  const ReceptiveProblem& problem;
  const ReceptiveLevel& level;
  const Tile& tile;
  const BackwardScratch<T>& scratch;
  const T* sums_grad;  // [9 sets, total channels] of this image, or nullptr
  T* token_partial;    // [K, C], or nullptr
  bool stream;

  static int64_t offset(const Feature& feature, int64_t n, int64_t c, int64_t p) {
    return n * feature.stride_n + c * feature.stride_c + p * feature.stride_p;
  }

  void planar_student() const {
    for (int64_t c = tile.first_channel; c < tile.last_channel; ++c) {
      for (int64_t i = 0; i < tile.count; i += kPiece) {
        const int64_t count = tile.count - i < kPiece ? tile.count - i : kPiece, p = tile.begin + i;
        const T* t = read_run(level.teacher, offset(level.teacher, tile.n, c, p), count, scratch.teacher_row);
        student_run(t, c, p, count, [&](int64_t j) { return scratch.coefficient[i + j]; });
      }
    }
  }

  void planar() const {
    const int64_t K = problem.num_tokens, C = level.channels, count = tile.count;
    const T* tokens = static_cast<const T*>(level.tokens);
    for (int64_t c = 0; c < C; ++c) {
      const T* t = read_run(level.teacher, offset(level.teacher, tile.n, c, tile.begin), count, scratch.teacher_row);
      student_run(t, c, tile.begin, count, [&](int64_t i) { return scratch.coefficient[i]; });
      if (token_partial)
        for (int64_t k = 0; k < K; ++k)
          token_partial[k * C + c] = dot_run(scratch.grad_logits + k * tile.stride, t, count);
      if (level.grad_teacher.present()) {
        T* row = scratch.result_row;
        start_teacher_run(row, count);
        for (int64_t k = 0; grads_reach_logits() && k < K; ++k)
          add_scaled_run(row, scratch.grad_logits + k * tile.stride, tokens[k * C + c], count);
        if (sums_grad) {
          const T* own = sums_grad + level.channel_offset + c;
          for (int64_t i = 0; i < count; ++i) row[i] += own[0];
          visit_borders<T>(level, tile.begin, count,
                           [&](int set, int64_t i) { row[i] += own[set * problem.total_channels]; });
        }
        write_run(level.grad_teacher, offset(level.grad_teacher, tile.n, c, tile.begin), count, row, stream);
      }
    }
  }

  void interleaved() const {
    const int64_t K = problem.num_tokens, C = level.channels, c = tile.first_channel, count = tile.last_channel - c;
    const T* tokens = static_cast<const T*>(level.tokens);
    if (token_partial) std::memset(token_partial, 0, size_t(K * C) * sizeof(T));
    for (int64_t i = 0; i < tile.count; ++i) {
      const int64_t p = tile.begin + i;
      const T* t = read_run(level.teacher, offset(level.teacher, tile.n, c, p), count, scratch.teacher_row);
      const T coefficient = scratch.coefficient[i];
      student_run(t, c, p, count, [&](int64_t) { return coefficient; });
      for (int64_t k = 0; token_partial && k < K; ++k)
        add_scaled_run(token_partial + k * C, t, scratch.grad_logits[k * tile.stride + i], C);
      if (level.grad_teacher.present()) {
        T* row = scratch.result_row;
        start_teacher_run(row, C);
        for (int64_t k = 0; grads_reach_logits() && k < K; ++k)
          add_scaled_run(row, tokens + k * C, scratch.grad_logits[k * tile.stride + i], C);
        if (sums_grad) {
          const T* own = sums_grad + level.channel_offset;
          add_run(row, own, C);
          visit_borders<T>(level, p, 1, [&](int set, int64_t) { add_run(row, own + set * problem.total_channels, C); });
        }
        write_run(level.grad_teacher, offset(level.grad_teacher, tile.n, 0, p), C, row, stream);
      }
    }
  }

 private:
  bool grads_reach_logits() const { return problem.num_tokens > 0; }

  // Leaves coefficient * (student - teacher) in grad_row and, where wanted, in the student's gradient.
  template <typename Coefficient>
  MASKD_INLINE void student_run(const T* t, int64_t c, int64_t p, int64_t count, Coefficient coefficient) const {
    if (!level.student.present() || !(level.grad_student.present() || level.grad_teacher.present())) return;
    const T* s = read_run(level.student, offset(level.student, tile.n, c, p), count, scratch.student_row);
    const Feature& result = level.grad_student;
    const bool in_place = !level.grad_teacher.present() && !stream && result.dtype == kDType<T>;
    T* row = in_place ? static_cast<T*>(result.data) + offset(result, tile.n, c, p) : scratch.grad_row;
    for (int64_t i = 0; i < count; ++i) row[i] = coefficient(i) * (s[i] - t[i]);
    if (result.present() && !in_place) write_run(result, offset(result, tile.n, c, p), count, row, stream);
  }

  void start_teacher_run(T* row, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) row[i] = level.student.present() ? -scratch.grad_row[i] : T(0);
  }
};

template <typename T>
bool backward(const ReceptiveProblem& problem, const ReceptiveStats& saved, const ReceptiveStats& grad) {
  const int64_t K = problem.num_tokens;
  int64_t* table = static_cast<int64_t*>(std::malloc(size_t(3 * problem.num_levels + 1) * sizeof(int64_t)));
  FreeDeleter free_table{table};
  if (!table) return false;

  bool logits_wanted = false, tokens_wanted = false;
  int64_t written_bytes = 0;
  for (int64_t l = 0; l < problem.num_levels; ++l) {
    const ReceptiveLevel& level = problem.levels[l];
    tokens_wanted |= level.grad_tokens != nullptr;
    logits_wanted |= level.grad_tokens != nullptr || level.grad_teacher.present();
    written_bytes += problem.batch * level.channels * level.pixels *
                     (int64_t(level.grad_student.present()) * size_of(level.grad_student.dtype) +
                      int64_t(level.grad_teacher.present()) * size_of(level.grad_teacher.dtype));
  }
  const Plan plan = lay_out<T>(problem, table, K, !logits_wanted);
  const bool stream = written_bytes >= kStreamBytes;
  for (int64_t l = 0; stream && l < problem.num_levels; ++l) {
    const ReceptiveLevel& level = problem.levels[l];
    const int64_t elements = problem.batch * level.channels * level.pixels;
    if (level.grad_student.present())
      prefer_huge_pages(level.grad_student.data, elements * size_of(level.grad_student.dtype));
    if (level.grad_teacher.present())
      prefer_huge_pages(level.grad_teacher.data, elements * size_of(level.grad_teacher.dtype));
  }
  const int threads = worker_count(problem);
  const int64_t partial_size = tokens_wanted ? K * plan.max_channels : 0;
  Arena measure{nullptr};
  BackwardScratch<T>{}.take(measure, problem, plan.max_size, plan.max_channels);
  const int64_t scratch_bytes = measure.used;
  Arena sizes{nullptr};
  const int64_t sets_size = grad.sums ? kTaps * problem.total_channels : 0;
  sizes.take<T>(plan.total * partial_size);
  sizes.take<T>(problem.batch * sets_size);
  sizes.take<char>(threads * scratch_bytes);
  void* block = std::malloc(size_t(sizes.used) + kVectorBytes);
  FreeDeleter free_block{block};
  if (!block) return false;
  Arena arena{static_cast<char*>(block) + (-reinterpret_cast<intptr_t>(block) & (kVectorBytes - 1))};
  T* partials = arena.take<T>(plan.total * partial_size);
  T* sets_grad = arena.take<T>(problem.batch * sets_size);
  for (int64_t n = 0; grad.sums && n < problem.batch; ++n) {
    for (int64_t c = 0; c < problem.total_channels; ++c)
      taps_to_sets(static_cast<const T*>(grad.sums) + n * sets_size + c, sets_grad + n * sets_size + c,
                   problem.total_channels);
  }
  char* scratch_base = arena.take<char>(threads * scratch_bytes);

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static, 1)
    for (int thread = 0; thread < threads; ++thread) {
      Arena own{scratch_base + thread * scratch_bytes};
      BackwardScratch<T> scratch{};
      scratch.take(own, problem, plan.max_size, plan.max_channels);
      // In reverse, so that the pass starts in what the forward left in the caches.
      for (int64_t task = plan.total - 1 - thread; task >= 0; task -= threads) {
        const Tile tile = plan.tile(task);
        const ReceptiveLevel& level = *tile.level;
        if (level.student.present()) student_coefficient(problem, tile, saved, grad, scratch.coefficient);
        if (logits_wanted) token_logit_gradients(problem, tile, saved, grad, scratch.grad_logits);
        const T* sums_grad = grad.sums ? sets_grad + tile.n * sets_size : nullptr;
        const BackwardTile<T> work{
            problem, level, tile, scratch, sums_grad, tokens_wanted ? partials + task * partial_size : nullptr, stream};
        if (level.interleaved) {
          work.interleaved();
        } else if (logits_wanted) {
          work.planar();
        } else {
          work.planar_student();
        }
      }
      if (stream) stream_fence();
    }
#pragma omp for schedule(static)
    for (int64_t l = 0; l < problem.num_levels; ++l) {
      const ReceptiveLevel& level = problem.levels[l];
      T* result = static_cast<T*>(level.grad_tokens);
      if (!result) continue;
      for (int64_t i = 0; i < K * level.channels; ++i) {
        double total = 0;
        for (int64_t task = plan.first[l]; task < plan.first[l + 1]; ++task)
          total += double(partials[task * partial_size + i]);
        result[i] = T(total);
      }
    }
  }
  return true;
}

}  // namespace

namespace MASKD_ISA {

bool receptive_forward(const ReceptiveProblem& problem, const ReceptiveStats& out) {
  return problem.float64 ? forward<double>(problem, out) : forward<float>(problem, out);
}

bool receptive_backward(const ReceptiveProblem& problem, const ReceptiveStats& saved, const ReceptiveStats& grad) {
  return problem.float64 ? backward<double>(problem, saved, grad) : backward<float>(problem, saved, grad);
}

}  // namespace MASKD_ISA
}  // namespace maskd
