// CPU kernel of maskd_loss. Compiled once per instruction set: MASKD_ISA names the namespace.
#include "maskd_loss.h"

#include <limits>
#include <type_traits>

#include "receptive_tiles.h"

namespace maskd {
namespace {

constexpr int64_t kSummedRuns = 8;  // interleaved runs whose errors are summed together

template <typename T>
struct LossScratch {
  T *weight, *factor, *student_row, *teacher_row, *result_row;

  void take(Arena& arena, const ReceptiveProblem&, int64_t tile, int64_t channels) {
    const int64_t run = round_up(channels > kPiece ? channels : kPiece, kLanes<T>);
    weight = arena.take<T>(tile);
    factor = arena.take<T>(tile);
    student_row = arena.take<T>(run);
    teacher_row = arena.take<T>(run);
    result_row = arena.take<T>(run);
  }
};

// weights [L, N, K]: softmax of the weighting module's logits. The average of a convolution's output is its weights
// times the average of what each tap reads. `mean` [N, 9C] and `hidden` [N, C], all levels side by side, are scratch.
template <typename T>
void mask_weights(const ReceptiveProblem& problem, const MaskWeighting* weighting, const T* sums, T* mean, T* hidden,
                  T* weights, int threads) {
  const int64_t levels = problem.num_levels, N = problem.batch, K = problem.num_tokens, stride = problem.total_channels;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t image = 0; image < levels * N; ++image) {
      const ReceptiveLevel& level = problem.levels[image / N];
      const int64_t n = image % N, offset = n * stride + level.channel_offset;
      const T pixels = T(level.pixels > 0 ? level.pixels : 1);
      for (int64_t c = 0; c < level.channels; ++c)
        for (int64_t tap = 0; tap < kTaps; ++tap)
          mean[kTaps * (offset + c) + tap] = sums[(n * kTaps + tap) * stride + level.channel_offset + c] / pixels;
    }
    // Most of the time: the weights of all convolutions, each read once.
    for (int64_t l = 0; l < levels; ++l) {
      const ReceptiveLevel& level = problem.levels[l];
      const int64_t C = level.channels, taps = kTaps * C;
      const T* conv_weight = static_cast<const T*>(weighting[l].conv_weight);
      const T* conv_bias = static_cast<const T*>(weighting[l].conv_bias);
#pragma omp for schedule(static) nowait
      for (int64_t c = 0; c < C; ++c) {
        for (int64_t n = 0; n < N; ++n) {
          const int64_t offset = n * stride + level.channel_offset;
          hidden[offset + c] = conv_bias[c] + dot_run<T, 4>(conv_weight + c * taps, mean + kTaps * offset, taps);
        }
      }
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t image = 0; image < levels * N; ++image) {
      const int64_t l = image / N, n = image % N, C = problem.levels[l].channels;
      const T* projection = static_cast<const T*>(weighting[l].projection_weight);
      const T* bias = static_cast<const T*>(weighting[l].projection_bias);
      T* row = weights + image * K;
      T largest = -std::numeric_limits<T>::infinity(), total = 0;
      for (int64_t k = 0; k < K; ++k) {
        const T* own = hidden + n * stride + problem.levels[l].channel_offset;
        row[k] = bias[k] + dot_run<T, 4>(projection + k * C, own, C);
        if (!(row[k] <= largest)) largest = row[k];  // NaN stays
      }
      for (int64_t k = 0; k < K; ++k) total += row[k] = std::exp(row[k] - largest);
      for (int64_t k = 0; k < K; ++k) row[k] /= total;
    }
  }
}

// Below this mass a mask counts as vanished: reference.least_mass says why, and what it changes.
template <typename T>
constexpr T kLeastMass = std::numeric_limits<T>::min() * T(int64_t(1) << 32);

// share = w / (C * N * (mass + eps)), in the place of the weights.
template <typename T>
void shares(const MaskdLoss& call, const ReceptiveLevel& level, const T* mass, T* share) {
  const int64_t N = call.problem.batch, K = call.problem.num_tokens;
  for (int64_t i = 0; i < N * K; ++i) {
    const T weight = call.weighting ? share[i] : T(1) / T(K), sum = mass[i] + T(call.eps);
    share[i] = weight / (sum < kLeastMass<T> ? kLeastMass<T> : sum);
    share[i] /= T(level.channels * N);
  }
}

// How the gradient of a run is written: not at all, to memory, or past the caches.
enum class Write { kNone, kStore, kStream };

// A sum over a few runs; adding the lanes of every run alone would cost as much as a short run does.
template <typename T>
struct ErrorSum {
  Vec<T> lanes[2] = {};
  T rest = 0;

  MASKD_INLINE double total() const { return double(horizontal_sum<T>(lanes[0] + lanes[1]) + rest); }
};

// Adds weight(i) * (s[i] - t[i])^2 to `error`; `result` receives factor(i) * (s[i] - t[i]). Weight and factor give
// whole vectors from a position on, of which the first entry is that position's, and inside of pairs what load_pair
// takes.
template <typename T, Write kWrite, typename Stored, typename Result, typename Weight, typename Factor>
MASKD_INLINE void error_run(const Stored* s, const Stored* t, int64_t count, Result* result, Weight weight,
                            Factor factor, ErrorSum<T>& error) {
  constexpr int64_t L = kLanes<T>;
  const auto step = [&](int64_t i, Vec<T>& sum) {
    const Vec<T> d = load(s + i) - load(t + i);
    sum += weight(i) * (d * d);
    if (kWrite == Write::kStore) store(result + i, factor(i) * d);
    if (kWrite == Write::kStream) stream_vector(result + i, factor(i) * d);
  };
  int64_t i = 0;
  for (; i + 2 * L <= count; i += 2 * L) {
    Vec<T> a, b, teacher_a, teacher_b;
    load_pair<Stored, T>(s + i, a, b), load_pair<Stored, T>(t + i, teacher_a, teacher_b);
    a -= teacher_a, b -= teacher_b;
    error.lanes[0] += weight(i) * (a * a), error.lanes[1] += weight(i + L) * (b * b);
    if (kWrite != Write::kNone) write_pair<kWrite == Write::kStream>(result + i, factor(i) * a, factor(i + L) * b);
  }
  for (; i + L <= count; i += L) step(i, error.lanes[0]);
  for (; i < count; ++i) {
    const T d = T(value_of(s[i])) - T(value_of(t[i]));
    error.rest += weight(i)[0] * (d * d);
    if (kWrite != Write::kNone) put(result + i, factor(i)[0] * d);
  }
}

// Brings what pixels are weighted with into the order in which load_pair takes the pixels.
template <typename T>
void pair_up(const ReceptiveLevel& level, T* values, int64_t count) {
  constexpr int64_t L = kLanes<T>;
  const bool apart = level.student.dtype == DType::bfloat16 && level.teacher.dtype == DType::bfloat16;
  if (!apart || level.interleaved) return;
  for (int64_t begin = 0; begin + 2 * L <= count; begin += 2 * L) {
    T pair[2 * L];
    std::memcpy(pair, values + begin, sizeof pair);
    for (int64_t i = 0; i < L; ++i) values[begin + i] = pair[2 * i], values[begin + L + i] = pair[2 * i + 1];
  }
}

// One run of what lies dense in memory: its error, and its gradient where wanted.
template <typename T, typename Weight, typename Factor>
MASKD_INLINE void visit_run(const Tile& tile, const LossScratch<T>& scratch, bool stream, int64_t c, int64_t p,
                            int64_t count, Weight weight, Factor factor, ErrorSum<T>& error) {
  const auto offset = [&](const Feature& feature) {
    return tile.n * feature.stride_n + c * feature.stride_c + p * feature.stride_p;
  };
  const ReceptiveLevel& level = *tile.level;
  const Feature& grad = level.grad_student;
  if (level.student.dtype != level.teacher.dtype) {
    const T* s = read_run(level.student, offset(level.student), count, scratch.student_row);
    const T* t = read_run(level.teacher, offset(level.teacher), count, scratch.teacher_row);
    error_run<T, Write::kStore>(s, t, count, scratch.result_row, weight, factor, error);
    if (grad.present()) write_run(grad, offset(grad), count, scratch.result_row, stream);
    return;
  }
  as_stored<T>(level.teacher, [&](auto* teacher) {
    using Stored = std::remove_const_t<std::remove_pointer_t<decltype(teacher)>>;
    const Stored* s = static_cast<const Stored*>(level.student.data) + offset(level.student);
    const Stored* t = teacher + offset(level.teacher);
    Stored* result = static_cast<Stored*>(grad.data) + offset(grad);  // of the student's type
    if (!grad.present()) {
      error_run<T, Write::kNone>(s, t, count, result, weight, factor, error);
    } else if (!stream) {
      error_run<T, Write::kStore>(s, t, count, result, weight, factor, error);
    } else if (std::is_same_v<Stored, BFloat> && elements_to_boundary(result) > 0) {
      // Weights and pixels meet in pairs from the run's beginning on.
      Stored* row = reinterpret_cast<Stored*>(scratch.result_row);
      error_run<T, Write::kStore>(s, t, count, row, weight, factor, error);
      stream_bytes(result, row, count * int64_t(sizeof(Stored)));
    } else {
      const int64_t before = elements_to_boundary(result), head = before < count ? before : count;
      error_run<T, Write::kStore>(s, t, head, result, weight, factor, error);
      error_run<T, Write::kStream>(
          s + head, t + head, count - head, result + head, [&](int64_t i) { return weight(head + i); },
          [&](int64_t i) { return factor(head + i); }, error);
    }
  });
}

// The error of each run of a tile, and the gradient. errors: [C] of a planar tile, [1] of an interleaved one.
template <typename T>
void visit_tile(const Tile& tile, const LossScratch<T>& scratch, const T* factors, bool stream, double* errors) {
  if (tile.level->interleaved) {
    errors[0] = 0;
    for (int64_t begin = 0; begin < tile.count; begin += kSummedRuns) {
      const int64_t end = begin + kSummedRuns < tile.count ? begin + kSummedRuns : tile.count;
      ErrorSum<T> error;
      for (int64_t i = begin; i < end; ++i) {
        const Vec<T> weight = scratch.weight[i] - Vec<T>{}, factor = factors[i] - Vec<T>{};
        visit_run(
            tile, scratch, stream, 0, tile.begin + i, tile.level->channels, [&](int64_t) { return weight; },
            [&](int64_t) { return factor; }, error);
      }
      errors[0] += error.total();
    }
    return;
  }
  const int64_t pieces = (tile.count + kPiece - 1) / kPiece;  // of the same size, none much too short
  const int64_t piece = pieces > 0 ? round_up((tile.count + pieces - 1) / pieces, 2 * kLanes<T>) : 0;
  for (int64_t c = tile.first_channel; c < tile.last_channel; ++c) {
    errors[c] = 0;
    for (int64_t begin = 0; begin < tile.count; begin += piece) {
      const int64_t count = tile.count - begin < piece ? tile.count - begin : piece;
      ErrorSum<T> error;
      visit_run(
          tile, scratch, stream, c, tile.begin + begin, count,
          [&](int64_t i) { return load(scratch.weight + begin + i); },
          [&](int64_t i) { return load(factors + begin + i); }, error);
      errors[c] += error.total();
    }
  }
}

template <typename T>
void run(const MaskdLoss& call) {
  const ReceptiveProblem& problem = call.problem;
  const int64_t levels = problem.num_levels, N = problem.batch, K = problem.num_tokens;
  const int threads = worker_count(problem);
  Workspace plan_memory;
  int64_t *table = nullptr, *first_error = nullptr;
  ReceptiveLevel* teachers = nullptr;
  plan_memory.provide([&](Arena& arena) {
    table = arena.take<int64_t>(3 * levels + 1);
    first_error = arena.take<int64_t>(levels + 1);
    teachers = arena.take<ReceptiveLevel>(levels);
  });
  const Plan plan = lay_out<T>(problem, table, K, true);
  int64_t written_bytes = 0;
  first_error[0] = 0;
  for (int64_t l = 0; l < levels; ++l) {
    const ReceptiveLevel& level = problem.levels[l];
    teachers[l] = level;
    if (!problem.customize) teachers[l].student = Feature();
    first_error[l + 1] = first_error[l] + N * plan.tiles[l] * (level.interleaved ? 1 : level.channels);
    if (level.grad_student.present())
      written_bytes += N * level.channels * level.pixels * size_of(level.grad_student.dtype);
  }
  const bool stream = written_bytes >= kStreamBytes;
  const int64_t weighted_channels = call.weighting ? N * problem.total_channels : 0;
  Workspace memory;
  T *mass = nullptr, *sums = nullptr, *mean = nullptr, *hidden = nullptr, *scaled = nullptr;
  double* errors = nullptr;
  char* scratch_base = nullptr;
  memory.provide([&](Arena& arena) {
    mass = arena.take<T>(levels * N * K);
    scaled = arena.take<T>(levels * N * K);
    sums = arena.take<T>(kTaps * weighted_channels);
    mean = arena.take<T>(kTaps * weighted_channels);
    hidden = arena.take<T>(weighted_channels);
    errors = arena.take<double>(first_error[levels]);
    scratch_base = arena.take<char>(threads * scratch_bytes<LossScratch<T>>(plan));
  });

  ReceptiveProblem first = problem;
  first.levels = teachers;
  ReceptiveStats stats;
  stats.masks = call.masks, stats.mass = mass, stats.sums = call.weighting ? sums : nullptr;
  MASKD_ISA::receptive_forward(first, stats);

  T* share = static_cast<T*>(call.share);
  if (call.weighting) mask_weights(problem, call.weighting, sums, mean, hidden, share, threads);
  for (int64_t l = 0; l < levels; ++l) shares(call, problem.levels[l], mass + l * N * K, share + l * N * K);
  for (int64_t i = 0; i < levels * N * K; ++i) scaled[i] = share[i] * T(call.upstream);
  const bool apart = call.upstream != 1;

  int started = 0;
  Tasks tasks(plan, true);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const auto scratch = own_scratch<LossScratch<T>>(plan, scratch_base, &started);
    tasks.each([&](int64_t task) {
      const Tile tile = plan.tile(task);
      const int64_t l = tile.level_index, index = tile.n * plan.tiles[l] + tile.begin / tile.stride;
      student_coefficient<T>(problem, tile, call.masks, share, nullptr, scratch.weight);
      pair_up(*tile.level, scratch.weight, tile.count);
      if (tile.level->grad_student.present() && apart) {
        student_coefficient<T>(problem, tile, call.masks, scaled, nullptr, scratch.factor);
        pair_up(*tile.level, scratch.factor, tile.count);
      }
      visit_tile(tile, scratch, apart ? scratch.factor : scratch.weight, stream,
                 errors + first_error[l] + index * (tile.level->interleaved ? 1 : tile.level->channels));
    });
    if (stream) stream_fence();
  }
  double loss = 0;
  for (int64_t i = 0; i < first_error[levels]; ++i) loss += errors[i];
  *static_cast<T*>(call.loss) = T(loss / 2);
}

}  // namespace

void MASKD_ISA::maskd_loss(const MaskdLoss& call) {
  return call.problem.float64 ? run<double>(call) : run<float>(call);
}

}  // namespace maskd
