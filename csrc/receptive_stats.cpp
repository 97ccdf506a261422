// CPU kernels of receptive_stats, forward. Compiled once per instruction set: MASKD_ISA names the namespace.
#include "receptive_stats.h"

#include <type_traits>

#include "receptive_tiles.h"

namespace maskd {
namespace {

constexpr int64_t kTokenChunk = 8;  // accumulators that fit the registers beside the rows
constexpr int64_t kSums = 8;        // lane sums taken at a time
#if defined(__AVX512F__)
constexpr int64_t kRows = 8;  // channels per step over a planar tile: as many as leave registers for the rest
#else
constexpr int64_t kRows = 4;
#endif
constexpr int64_t kConverted = 512;  // elements per row and step where rows are converted first

// ---- One step: kRows channels of a planar tile -------------------------------------------------

template <typename T, int KC, bool kDistance, typename Stored>
MASKD_INLINE void accumulate_rows(const Stored* const* t, const Stored* const* s, const T* tokens, int64_t vectors,
                                  T* logits, int64_t stride, T* distance, Vec<T>* sums) {
  constexpr int64_t L = kLanes<T>;
  const Stored *own_t[kRows], *own_s[kRows];  // which no store can change
  Vec<T> kept[kRows];
  for (int64_t r = 0; r < kRows; ++r) own_t[r] = t[r], own_s[r] = kDistance ? s[r] : nullptr, kept[r] = sums[r];
  for (int64_t i = 0; i < vectors * L; i += L) {
    Vec<T> row[kRows];
    for (int64_t r = 0; r < kRows; ++r) kept[r] += row[r] = load(own_t[r] + i);
    if (kDistance) {
      Vec<T> total = load(distance + i);
      for (int64_t r = 0; r < kRows; ++r) {
        const Vec<T> d = load(own_s[r] + i) - row[r];
        total += d * d;
      }
      store(distance + i, total);
    }
    for (int k = 0; k < KC; ++k) {
      T* logit = logits + k * stride + i;
      Vec<T> total = load(logit);  // one chain of multiply-adds: the steps beside it keep the units busy
      for (int64_t r = 0; r < kRows; ++r) total += tokens[k * kRows + r] * row[r];
      store(logit, total);
    }
  }
  for (int64_t r = 0; r < kRows; ++r) sums[r] = kept[r];
}

template <typename T, bool kDistance, typename Stored>
MASKD_INLINE void accumulate_chunk(int64_t chunk, const Stored* const* t, const Stored* const* s, const T* tokens,
                                   int64_t vectors, T* logits, int64_t stride, T* distance, Vec<T>* sums) {
#define MASKD_CASE(KC) \
  case KC:             \
    return accumulate_rows<T, KC, kDistance>(t, s, tokens, vectors, logits, stride, distance, sums)
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
template <typename T, typename Stored>
void accumulate(const Stored* const* t, const Stored* const* s, const T* tokens, int64_t num_tokens, int64_t vectors,
                T* logits, int64_t stride, T* distance, Vec<T>* sums) {
  Vec<T> discarded[kRows] = {};
  int64_t k = 0;
  do {
    const int64_t chunk = num_tokens - k < kTokenChunk ? num_tokens - k : kTokenChunk;
    const T* e = tokens + k * kRows;
    if (k == 0 && distance) {
      accumulate_chunk<T, true>(chunk, t, s, e, vectors, logits, stride, distance, sums);
    } else {
      accumulate_chunk<T, false>(chunk, t, s, e, vectors, logits + k * stride, stride, distance,
                                 k == 0 ? sums : discarded);
    }
    k += chunk;
  } while (k < num_tokens);
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

// `count` elements of a row from `offset` on, as what the features hold; where student and teacher hold different types
// they are read as T.
template <typename T, typename Stored>
MASKD_INLINE const Stored* stored_row(const Feature& feature, int64_t offset, int64_t count, T* buffer) {
  if constexpr (sizeof(Stored) == sizeof(T)) {
    return read_run(feature, offset, count, buffer);
  } else {
    return static_cast<const Stored*>(feature.data) + offset;
  }
}

template <typename T, typename Stored>
void forward_planar(const ReceptiveProblem& problem, const Tile& tile, const ForwardScratch<T>& scratch, T* sums) {
  constexpr int64_t L = kLanes<T>;
  const ReceptiveLevel& level = *tile.level;
  const bool with_student = level.student.present();
  const int64_t K = problem.num_tokens, C = level.channels;
  const T* tokens = static_cast<const T*>(level.tokens);
  const Feature* features[2] = {&level.teacher, &level.student};
  const int64_t run = round_up(tile.stride, L);

  // Rows that are converted first are taken in pieces that the L1 cache holds.
  const bool converted = with_student && level.student.dtype != level.teacher.dtype;
  const int64_t piece = converted ? kConverted : tile.count;

  for (int64_t c = 0; c < C; c += kRows) {
    const int64_t rows = C - c < kRows ? C - c : kRows;
    for (int64_t k = 0; k < K; ++k)
      for (int64_t r = 0; r < kRows; ++r) scratch.packed[k * kRows + r] = r < rows ? tokens[k * C + c + r] : T(0);
    Vec<T> row_sums[kRows] = {};
    for (int64_t r = 0; sums && r < rows; ++r)
      for (int set = 0; set < kTaps; ++set) sums[set * C + c + r] = T(0);

    for (int64_t begin = 0; begin < tile.count; begin += piece) {
      const int64_t count = tile.count - begin < piece ? tile.count - begin : piece, whole = count / L,
                    tail = count % L;
      const Stored* main_rows[2][kRows];
      const T* tail_rows[2][kRows];
      for (int f = 0; f < (with_student ? 2 : 1); ++f) {
        for (int64_t r = 0; r < kRows; ++r) {
          const int64_t channel = c + (r < rows ? r : 0);
          const int64_t offset = tile.n * features[f]->stride_n + channel * features[f]->stride_c + tile.begin + begin;
          main_rows[f][r] = stored_row<T, Stored>(*features[f], offset, count, scratch.rows + (f * kRows + r) * run);
          T* tail_row = scratch.tails + (f * kRows + r) * L;
          for (int64_t i = 0; i < L; ++i) tail_row[i] = i < tail ? T(value_of(main_rows[f][r][whole * L + i])) : T(0);
          tail_rows[f][r] = tail_row;
        }
      }
      // The rows that stand in behind the last channel get token 0, and the teacher's row as the student's.
      for (int64_t r = rows; with_student && r < kRows; ++r)
        main_rows[1][r] = main_rows[0][r], tail_rows[1][r] = tail_rows[0][r];

      T* distance = with_student ? scratch.distance + begin : nullptr;
      T* logits = scratch.logits + begin;
      accumulate<T>(main_rows[0], main_rows[1], scratch.packed, K, whole, logits, tile.stride, distance, row_sums);
      if (tail)
        accumulate<T>(tail_rows[0], tail_rows[1], scratch.packed, K, 1, logits + whole * L, tile.stride,
                      distance ? distance + whole * L : nullptr, row_sums);
      if (problem.customize) {
        Vec<T> discarded[kRows] = {};
        T* own = scratch.student_logits + begin;
        accumulate<T, Stored>(main_rows[1], nullptr, scratch.packed, K, whole, own, tile.stride, nullptr, discarded);
        if (tail)
          accumulate<T, T>(tail_rows[1], nullptr, scratch.packed, K, 1, own + whole * L, tile.stride, nullptr,
                           discarded);
      }
      if (sums) {
        visit_borders<T>(level, tile.begin + begin, count, [&](int set, int64_t i) {
          for (int64_t r = 0; r < rows; ++r) sums[set * C + c + r] += T(value_of(main_rows[0][r][i]));
        });
      }
    }
    for (int64_t r = 0; sums && r < rows; ++r) sums[c + r] = horizontal_sum<T>(row_sums[r]);
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
  const auto row = [&](const Feature& feature, int64_t p, T* buffer) {
    const int64_t offset = tile.n * feature.stride_n + p * feature.stride_p;
    if (p + kAhead < level.pixels) prefetch_run(feature, offset + kAhead * feature.stride_p, C);
    return whole_vectors(read_run(feature, offset, C, buffer), C, buffer);
  };

  for (int64_t i = 0; i < tile.count; ++i) {
    const int64_t p = tile.begin + i;
    const T* t = row(level.teacher, p, scratch.rows);
    const T* s = with_student ? row(level.student, p, student_buffer) : nullptr;
    dot_tokens(t, s, scratch.packed, K, padded, scratch.logits + i, tile.stride,
               with_student ? scratch.distance + i : nullptr);
    if (problem.customize)
      dot_tokens<T>(s, nullptr, scratch.packed, K, padded, scratch.student_logits + i, tile.stride, nullptr);
    if (sums) add_run(sums, t, C);
  }
  if (sums) {
    visit_borders<T>(level, tile.begin, tile.count, [&](int set, int64_t i) {
      add_run(sums + set * C, row(level.teacher, tile.begin + i, scratch.rows), C);
    });
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
void forward(const ReceptiveProblem& problem, const ReceptiveStats& out) {
  const int64_t K = problem.num_tokens;
  Workspace plan_memory;
  int64_t* table = nullptr;
  plan_memory.provide([&](Arena& arena) { table = arena.take<int64_t>(3 * problem.num_levels + 1); });
  const Plan plan = lay_out<T>(problem, table, problem.customize ? 2 * K : K, false);

  const int threads = worker_count(problem);
  const int64_t partial_size = 2 * K + K * (K + 1) / 2;
  const int64_t sums_size = out.sums ? kTaps * plan.max_channels : 0;
  Workspace memory;
  double* partials = nullptr;
  T* sums = nullptr;
  char* scratch_base = nullptr;
  memory.provide([&](Arena& arena) {
    partials = arena.take<double>(plan.total * partial_size);
    sums = arena.take<T>(plan.total * sums_size);
    scratch_base = arena.take<char>(threads * scratch_bytes<ForwardScratch<T>>(plan));
  });

  int started = 0;
  Tasks tasks(plan);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const auto scratch = own_scratch<ForwardScratch<T>>(plan, scratch_base, &started);
    tasks.each([&](int64_t task) {
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
        const Feature& teacher = tile.level->teacher;
        const bool alike = !tile.level->student.present() || tile.level->student.dtype == teacher.dtype;
        if (!alike) {
          forward_planar<T, T>(problem, tile, scratch, tile_sums);
        } else {
          as_stored<T>(teacher, [&](auto* stored) {
            forward_planar<T, std::remove_const_t<std::remove_pointer_t<decltype(stored)>>>(problem, tile, scratch,
                                                                                            tile_sums);
          });
        }
      }
      finish_tile(problem, tile, scratch, out, partials + task * partial_size);
    });
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t image = 0; image < problem.num_levels * problem.batch; ++image)
      reduce_image(plan, image / problem.batch, image % problem.batch, partials, partial_size, sums, sums_size, out);
  }
}

}  // namespace

void MASKD_ISA::receptive_forward(const ReceptiveProblem& problem, const ReceptiveStats& out) {
  return problem.float64 ? forward<double>(problem, out) : forward<float>(problem, out);
}

}  // namespace maskd
