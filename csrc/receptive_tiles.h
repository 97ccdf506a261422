// How the kernels of receptive_stats cut their work: tiles of consecutive pixels times all channels, each with partial
// results of its own, which are added in a fixed order: the result does not depend on the number of threads.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#endif

#if defined(MASKD_SANITIZE)
#include <sanitizer/asan_interface.h>
#endif

#include "memory_pool.h"
#include "receptive_stats.h"

namespace maskd {
namespace {

constexpr int64_t kAccumulatorBytes = 256 << 10;  // of a tile: they stay in the L2 cache while its channels stream by
constexpr int64_t kInterleavedPixels = 128;       // of a tile whose accumulators are touched once
constexpr int64_t kAhead = 4;                     // pixels: how far ahead interleaved runs are fetched
constexpr int64_t kLeastTiles = 8;  // of a level, if they have kLeastPixels: for several threads, however many
constexpr int64_t kLeastPixels = 512;
constexpr int64_t kCachedElements = 1 << 19;  // of maps that the caches hold from one pass to the next
constexpr int64_t kStudentPixels = 1 << 15;   // of a tile that only needs the student's gradient: long rows in sequence

#if defined(MASKD_SANITIZE)
constexpr int64_t kGap = kVectorBytes;  // between two pieces of memory, so that AddressSanitizer sees where one ends
#else
constexpr int64_t kGap = 0;
#endif

// Bump allocator; without a base it only adds up.
struct Arena {
  char* base = nullptr;
  int64_t used = 0;

  template <typename T>
  T* take(int64_t count) {
    T* p = base ? reinterpret_cast<T*>(base + used) : nullptr;
    const int64_t bytes = count * int64_t(sizeof(T)), taken = round_up(bytes, kVectorBytes) + kGap;
#if defined(MASKD_SANITIZE)
    if (p) __asan_poison_memory_region(reinterpret_cast<char*>(p) + bytes, size_t(taken - bytes));
#endif
    used += taken;
    return p;
  }
};

// The memory of one call, from the pool: fresh pages cost more than what is computed in them. `arrange(arena)` runs
// twice: to add up what it takes, then to take it.
struct Workspace {
  Block* block = nullptr;
  ~Workspace() { delete block; }

  template <typename Arrange>
  void provide(Arrange arrange) {
    Arena sizes;
    arrange(sizes);
    block = new Block(sizes.used + kVectorBytes);
    Arena arena{static_cast<char*>(block->data())};
    arrange(arena);
  }
};

// Pixels per tile: long rows, because the processor's prefetching follows a row and loses it where the tile ends.
template <typename T>
int64_t tile_pixels(const ReceptiveProblem& problem, const ReceptiveLevel& level, int64_t accumulators) {
  int64_t largest = kAccumulatorBytes / int64_t(sizeof(T)) / (accumulators + 1);
  if (level.interleaved && largest > kInterleavedPixels) largest = kInterleavedPixels;
  if (level.pixels == 0) return 0;
  int64_t tiles = (level.pixels + largest - 1) / largest;
  while (tiles * problem.batch < kLeastTiles && level.pixels >= 2 * tiles * kLeastPixels) tiles *= 2;
  return (level.pixels + tiles - 1) / tiles;
}

int64_t elements_of(const ReceptiveProblem& problem) {
  int64_t elements = 0;
  for (int64_t l = 0; l < problem.num_levels; ++l)
    elements += problem.batch * problem.levels[l].channels * problem.levels[l].pixels;
  return elements;
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
  bool cached;        // the caches hold the maps from one pass to the next: all passes have the same tiles
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
  const bool cached = elements_of(problem) <= kCachedElements;
  student_only &= !cached;
  Plan plan{&problem, table, table + levels + 1, table + 2 * levels + 1, cached, student_only};
  for (int64_t l = 0; l < levels; ++l) {
    const ReceptiveLevel& level = problem.levels[l];
    int64_t size = tile_pixels<T>(problem, level, accumulators);
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

// What one thread's scratch takes.
template <typename Scratch>
int64_t scratch_bytes(const Plan& plan) {
  Arena sizes;
  Scratch{}.take(sizes, *plan.problem, plan.max_size, plan.max_channels);
  return sizes.used;
}

// The calling thread's scratch, of those that lie behind `base`; `started` counts the threads that have theirs.
template <typename Scratch>
Scratch own_scratch(const Plan& plan, char* base, int* started) {
  int mine = 0;
#pragma omp atomic capture
  mine = (*started)++;
  Arena own{base + mine * scratch_bytes<Scratch>(plan)};
  Scratch scratch{};
  scratch.take(own, *plan.problem, plan.max_size, plan.max_channels);
  return scratch;
}

int worker_count(const ReceptiveProblem& problem) {
  return elements_of(problem) < kSerialElements || problem.threads < 1 ? 1 : problem.threads;
}

// Shares out the tasks of a pass among the threads of a parallel region. Neighbours are handed out together, and
// whoever is held up takes fewer; of cached maps a thread gets what it had in the pass before. A second pass goes in
// reverse, so that it starts in what the first left in the caches.
class Tasks {
 public:
  explicit Tasks(const Plan& plan, bool second_pass = false)
      : total_(plan.total), cached_(plan.cached), reversed_(second_pass && !plan.cached) {}

  // visit(task) for those of the calling thread.
  template <typename Visit>
  MASKD_INLINE void each(Visit visit) {
#if defined(_OPENMP)
    const int64_t first = omp_get_thread_num(), step = omp_get_num_threads();
#else
    const int64_t first = 0, step = 1;
#endif
    for (int64_t i = cached_ ? first : take(); i < total_; i = cached_ ? i + step : take())
      visit(reversed_ ? total_ - 1 - i : i);
  }

 private:
  int64_t take() {
    int64_t next;
#pragma omp atomic capture
    next = taken_++;
    return next;
  }

  const int64_t total_;
  const bool cached_, reversed_;
  int64_t taken_ = 0;
};

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

// a . b, in kSums sums side by side, a power of two: more of them where the run is long and nothing else is going on.
template <typename T, int64_t kSums>
MASKD_INLINE T dot_run(const T* a, const T* b, int64_t count) {
  constexpr int64_t L = kLanes<T>;
  Vec<T> sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * L <= count; i += kSums * L)
    for (int64_t j = 0; j < kSums; ++j) sums[j] += load(a + i + j * L) * load(b + i + j * L);
  for (int64_t half = kSums / 2; half > 0; half /= 2)
    for (int64_t j = 0; j < half; ++j) sums[j] = sums[2 * j] + sums[2 * j + 1];
  T total = horizontal_sum<T>(sums[0]);
  for (; i < count; ++i) total += a[i] * b[i];
  return total;
}

// coefficient[p] = 2 * (sum_k g_error[k] * mask[k,p]^2 + g_distance[p]), so that d student = coefficient * (student -
// teacher). masks [N, K, P]; upstream gradients g_error [L, N, K] and g_distance [N, P], or nullptr.
template <typename T>
void student_coefficient(const ReceptiveProblem& problem, const Tile& tile, const void* masks, const void* grad_error,
                         const void* grad_distance, T* coefficient) {
  const int64_t K = problem.num_tokens, P = problem.total_pixels, column = tile.level->pixel_offset + tile.begin;
  const T* distance_grad = static_cast<const T*>(grad_distance);
  const T* error_grad = static_cast<const T*>(grad_error);
  if (error_grad) error_grad += (tile.level_index * problem.batch + tile.n) * K;
  for (int64_t begin = 0; begin < tile.count; begin += kPiece) {
    const int64_t count = tile.count - begin < kPiece ? tile.count - begin : kPiece;
    T* piece = coefficient + begin;
    for (int64_t i = 0; i < count; ++i)
      piece[i] = distance_grad ? 2 * distance_grad[tile.n * P + column + begin + i] : T(0);
    for (int64_t k = 0; error_grad && k < K; ++k) {
      const T* mask = static_cast<const T*>(masks) + (tile.n * K + k) * P + column + begin;
      const T factor = 2 * error_grad[k];
      for (int64_t i = 0; i < count; ++i) piece[i] += factor * mask[i] * mask[i];
    }
  }
}

}  // namespace
}  // namespace maskd
