// Python bindings of csrc/: the only place that knows both. Addresses, shapes and strides arrive as
// integers, which are checked against each other; no Torch header is needed, so one build serves every Torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "dlpack.h"
#include "isa.h"
#include "memory_pool.h"

namespace py = pybind11;
using namespace maskd;

namespace {

const Kernels* selected = nullptr;

std::vector<std::string> isas() {
  int count = 0;
  const Kernels* kernels = available_kernels(&count);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) names.emplace_back(kernels[i].isa);
  return names;
}

void select_isa(const std::string& name) {
  int count = 0;
  const Kernels* kernels = available_kernels(&count);
  for (int i = 0; i < count; ++i) {
    if (name == kernels[i].isa) {
      selected = &kernels[i];
      return;
    }
  }
  throw std::invalid_argument("isa: '" + name + "' is unknown or not supported by this processor");
}

// addresses of conv_weight, conv_bias, projection_weight, projection_bias
using WeightingTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>;

// addresses of teacher, student, tokens, grad_student
using LevelAddresses = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>;

// A level whose features agree with each other, and what the call's problem must agree with.
struct CheckedLevel {
  ReceptiveLevel level;
  MapShape shape;
  bool float64 = false, has_student = false;
  BufferTuple tokens, grad_tokens;
};

CheckedLevel checked_level(const FeatureTuple& teacher, const FeatureTuple& student, const FeatureTuple& grad_teacher,
                           const FeatureTuple& grad_student, const BufferTuple& tokens, const BufferTuple& grad_tokens,
                           int64_t channels, int64_t pixels, bool interleaved, int64_t width, int64_t pixel_offset,
                           int64_t channel_offset) {
  CheckedLevel checked;
  ReceptiveLevel& level = checked.level;
  const MapShape shape{std::get<0>(std::get<2>(teacher)), channels, pixels, interleaved, 1};
  const bool float64 = std::get<1>(teacher) == kFloat64;
  check_shape(shape);
  require(channels > 0, "channels", "expected at least one");
  require(width == 0 || (width > 0 && pixels % width == 0), "width", "expected whole rows of pixels");
  checked.shape = shape, checked.float64 = float64, checked.has_student = is_given(student);
  checked.tokens = tokens, checked.grad_tokens = grad_tokens;
  level.teacher = feature(teacher, "teacher", shape, float64);
  level.student = optional_feature(student, "student", shape, float64);
  level.grad_teacher = optional_feature(grad_teacher, "grad_teacher", shape, float64, true);
  level.grad_student = optional_feature(grad_student, "grad_student", shape, float64, true);
  level.channels = channels, level.pixels = pixels, level.interleaved = interleaved, level.width = width;
  level.pixel_offset = pixel_offset, level.channel_offset = channel_offset;
  return checked;
}

// The levels of a call, in agreement with each other.
struct CheckedProblem {
  std::vector<ReceptiveLevel> levels;
  ReceptiveProblem problem;
  bool has_student = true;

  CheckedProblem(const std::vector<CheckedLevel>& given, int64_t batch, int64_t num_tokens, bool float64,
                 bool customize, int threads) {
    ReceptiveProblem& p = problem;
    require(!given.empty(), "levels", "expected at least one");
    require(num_tokens >= 0 && num_tokens <= kMaxTokens, "num_tokens",
            "expected 0 to " + std::to_string(kMaxTokens) + ", got " + std::to_string(num_tokens));
    levels.reserve(given.size());
    for (const CheckedLevel& checked : given) {
      levels.push_back(checked.level);
      ReceptiveLevel& level = levels.back();
      require(checked.shape.batch == batch, "levels", "expected the same batch size in each");
      require(checked.float64 == float64, "levels", "expected float64 in all or none");
      require(level.pixel_offset == p.total_pixels && level.channel_offset == p.total_channels, "levels",
              "expected them side by side");
      const int64_t count = num_tokens * level.channels;
      level.tokens = required(checked.tokens, "tokens", count, compute_code(float64));
      level.grad_tokens = wanted(checked.grad_tokens, "grad_tokens", count, compute_code(float64));
      p.total_pixels += level.pixels, p.total_channels += level.channels;
      has_student &= checked.has_student;
    }
    require(has_student || !customize, "customize", "expected a student");
    p.levels = levels.data(), p.num_levels = int64_t(levels.size()), p.batch = batch, p.num_tokens = num_tokens;
    p.float64 = float64, p.customize = customize, p.threads = threads;
  }

  bool empty() const { return problem.batch * problem.total_pixels == 0; }

  // Those that are there, in the order of the struct's fields.
  ReceptiveStats stats(const std::vector<BufferTuple>& given) const {
    const ReceptiveProblem& p = problem;
    require(given.size() == 7, "statistics", "expected seven");
    const int code = compute_code(p.float64);
    const int64_t N = p.batch, K = p.num_tokens, P = p.total_pixels, L = p.num_levels;
    ReceptiveStats s;
    s.masks = wanted(given[0], "masks", N * K * P, code);
    s.teacher_masks = wanted(given[1], "teacher_masks", N * K * P, code);
    s.distance = wanted(given[2], "distance", N * P, code);
    s.mass = wanted(given[3], "mass", L * N * K, code);
    s.error = wanted(given[4], "error", L * N * K, code);
    s.gram = wanted(given[5], "gram", L * N * K * K, code);
    s.sums = wanted(given[6], "sums", N * kTaps * p.total_channels, code);
    return s;
  }
};

// The same level elsewhere in memory.
void place(ReceptiveLevel& level, const LevelAddresses& addresses, int64_t batch) {
  const auto [teacher, student, tokens, grad_student] = addresses;
  require(teacher && student && tokens || batch * level.pixels == 0, "addresses", "expected an address, got none");
  level.teacher.data = pointer(teacher), level.student.data = pointer(student);
  level.tokens = pointer(tokens);
  require(!grad_student || level.grad_student.present(), "addresses", "expected no gradient of this level");
  level.grad_student.data = pointer(grad_student);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU kernels of maskd_kernels.";
  selected = [] {
    int count = 0;
    return available_kernels(&count);
  }();

  m.def("isas", &isas, "Instruction sets this processor and build support, best first.");
  m.def("isa", [] { return std::string(selected->isa); }, "The instruction set in use.");
  m.def("select_isa", &select_isa, py::arg("name"));

  m.def(
      "new_tensor",
      [](std::vector<int64_t> shape, std::vector<int64_t> strides, int dtype) {
        return new_tensor(std::move(shape), std::move(strides), checked_dtype(dtype, "dtype"));
      },
      py::arg("shape"), py::arg("strides"), py::arg("dtype"), "An uninitialised tensor as a DLPack capsule.");
  m.def(
      "pool_state", [] { return std::make_pair(pool_state().in_use, pool_state().idle); }, "Bytes in use, bytes idle.");
  m.def("release_idle_memory", &release_idle_memory);

  py::class_<CheckedLevel>(m, "ReceptiveLevel")
      .def(py::init(&checked_level), py::arg("teacher"), py::arg("student"), py::arg("grad_teacher"),
           py::arg("grad_student"), py::arg("tokens"), py::arg("grad_tokens"), py::arg("channels"), py::arg("pixels"),
           py::arg("interleaved"), py::arg("width"), py::arg("pixel_offset"), py::arg("channel_offset"));

  m.def(
      "receptive_forward",
      [](const std::vector<CheckedLevel>& levels, int64_t batch, int64_t num_tokens, bool float64, bool customize,
         int threads, const std::vector<BufferTuple>& out) {
        const CheckedProblem p(levels, batch, num_tokens, float64, customize, threads);
        const ReceptiveStats s = p.stats(out);
        require((s.masks || p.empty() || !num_tokens) && (s.mass || !batch || !num_tokens), "out",
                "expected masks and mass");
        require(p.has_student || !(s.distance || s.error), "out", "expected no distance without a student");
        py::gil_scoped_release release;
        selected->receptive_forward(p.problem, s);
      },
      py::arg("levels"), py::arg("batch"), py::arg("num_tokens"), py::arg("float64"), py::arg("customize"),
      py::arg("threads"), py::arg("out"));

  m.def(
      "receptive_backward",
      [](const std::vector<CheckedLevel>& levels, int64_t batch, int64_t num_tokens, bool float64, bool customize,
         int threads, const std::vector<BufferTuple>& saved, const std::vector<BufferTuple>& grad) {
        const CheckedProblem p(levels, batch, num_tokens, float64, customize, threads);
        const ReceptiveStats s = p.stats(saved), g = p.stats(grad);
        const bool empty = p.empty() || !num_tokens;
        require(empty || s.masks, "saved", "expected masks");
        require(empty || s.teacher_masks || !customize, "saved", "expected the teacher's masks");
        bool of_logits = false;
        for (const ReceptiveLevel& level : p.levels) of_logits |= level.grad_tokens || level.grad_teacher.present();
        require(empty || s.distance || !g.error || !of_logits, "saved", "expected the distance");
        py::gil_scoped_release release;
        selected->receptive_backward(p.problem, s, g);
      },
      py::arg("levels"), py::arg("batch"), py::arg("num_tokens"), py::arg("float64"), py::arg("customize"),
      py::arg("threads"), py::arg("saved"), py::arg("grad"));

  m.def(
      "maskd_loss",
      [](const std::vector<CheckedLevel>& levels, const std::vector<LevelAddresses>& addresses,
         const std::vector<WeightingTuple>& weighting, int64_t batch, int64_t num_tokens, bool float64, bool customize,
         int threads, double eps, double upstream, const BufferTuple& masks, const BufferTuple& share,
         const BufferTuple& loss) {
        CheckedProblem p(levels, batch, num_tokens, float64, customize, threads);
        require(p.has_student, "levels", "expected a student");
        require(addresses.size() == levels.size(), "addresses", "expected one per level");
        require(weighting.empty() || weighting.size() == levels.size(), "weighting", "expected one per level");
        for (size_t l = 0; l < levels.size(); ++l) place(p.levels[l], addresses[l], batch);
        std::vector<MaskWeighting> parameters;
        for (const WeightingTuple& w : weighting) {
          MaskWeighting own;
          own.conv_weight = pointer(std::get<0>(w)), own.conv_bias = pointer(std::get<1>(w));
          own.projection_weight = pointer(std::get<2>(w)), own.projection_bias = pointer(std::get<3>(w));
          require(own.conv_weight && own.conv_bias && own.projection_weight && own.projection_bias, "weighting",
                  "expected addresses, got none");
          parameters.push_back(own);
        }
        const int code = compute_code(float64);
        MaskdLoss call;
        call.problem = p.problem;
        call.weighting = parameters.empty() ? nullptr : parameters.data();
        call.eps = eps, call.upstream = upstream;
        call.masks = required(masks, "masks", batch * num_tokens * p.problem.total_pixels, code);
        call.share = required(share, "share", p.problem.num_levels * batch * num_tokens, code);
        call.loss = required(loss, "loss", 1, code);
        py::gil_scoped_release release;
        selected->maskd_loss(call);
      },
      py::arg("levels"), py::arg("addresses"), py::arg("weighting"), py::arg("batch"), py::arg("num_tokens"),
      py::arg("float64"), py::arg("customize"), py::arg("threads"), py::arg("eps"), py::arg("upstream"),
      py::arg("masks"), py::arg("share"), py::arg("loss"));

  py::class_<MapShape>(m, "MapShape")
      .def(py::init([](int64_t batch, int64_t channels, int64_t pixels, bool interleaved, int threads) {
             const MapShape shape{batch, channels, pixels, interleaved, threads};
             check_shape(shape);
             return shape;
           }),
           py::arg("batch"), py::arg("channels"), py::arg("pixels"), py::arg("interleaved"), py::arg("threads"));

  m.def(
      "scale_pixels_forward",
      [](const MapShape& shape, const FeatureTuple& x, const FeatureTuple& y, const BufferTuple& scale, bool float64) {
        ScalePixels p;
        p.shape = shape, p.x = feature(x, "x", shape, float64), p.y = feature(y, "y", shape, float64, true),
        p.scale = required(scale, "scale", shape.batch * shape.pixels, compute_code(float64)), p.float64 = float64;
        py::gil_scoped_release release;
        selected->scale_pixels_forward(p);
      },
      py::arg("shape"), py::arg("x"), py::arg("y"), py::arg("scale"), py::arg("float64"));

  m.def(
      "scale_pixels_backward",
      [](const MapShape& shape, const FeatureTuple& x, const FeatureTuple& grad_y, const FeatureTuple& grad_x,
         const BufferTuple& scale, const BufferTuple& grad_scale, bool float64) {
        ScalePixels p;
        p.shape = shape, p.x = feature(x, "x", shape, float64), p.grad_y = feature(grad_y, "grad_y", shape, float64),
        p.grad_x = optional_feature(grad_x, "grad_x", shape, float64, true);
        p.scale = required(scale, "scale", shape.batch * shape.pixels, compute_code(float64)),
        p.grad_scale = wanted(grad_scale, "grad_scale", shape.batch * shape.pixels, compute_code(float64)),
        p.float64 = float64;
        py::gil_scoped_release release;
        selected->scale_pixels_backward(p);
      },
      py::arg("shape"), py::arg("x"), py::arg("grad_y"), py::arg("grad_x"), py::arg("scale"), py::arg("grad_scale"),
      py::arg("float64"));

  m.def(
      "squared_error_forward",
      [](const MapShape& shape, const FeatureTuple& pred, const FeatureTuple& target, const BufferTuple& scale,
         const BufferTuple& error, bool float64) {
        SquaredError p;
        p.shape = shape, p.pred = feature(pred, "pred", shape, float64),
        p.target = feature(target, "target", shape, float64);
        p.scale = wanted(scale, "scale", shape.batch * shape.channels, compute_code(float64)),
        p.error = required(error, "error", shape.batch, compute_code(float64)), p.float64 = float64;
        py::gil_scoped_release release;
        selected->squared_error_forward(p);
      },
      py::arg("shape"), py::arg("pred"), py::arg("target"), py::arg("scale"), py::arg("error"), py::arg("float64"));

  m.def(
      "squared_error_backward",
      [](const MapShape& shape, const FeatureTuple& pred, const FeatureTuple& target, const FeatureTuple& grad_pred,
         const FeatureTuple& grad_target, const BufferTuple& scale, const BufferTuple& grad_scale,
         const BufferTuple& grad, bool float64) {
        SquaredError p;
        p.shape = shape, p.pred = feature(pred, "pred", shape, float64),
        p.target = feature(target, "target", shape, float64);
        p.grad_pred = optional_feature(grad_pred, "grad_pred", shape, float64, true),
        p.grad_target = optional_feature(grad_target, "grad_target", shape, float64, true);
        p.scale = wanted(scale, "scale", shape.batch * shape.channels, compute_code(float64)),
        p.grad_scale = wanted(grad_scale, "grad_scale", shape.batch * shape.channels, compute_code(float64)),
        p.grad = required(grad, "grad", shape.batch, compute_code(float64)), p.float64 = float64;
        py::gil_scoped_release release;
        selected->squared_error_backward(p);
      },
      py::arg("shape"), py::arg("pred"), py::arg("target"), py::arg("grad_pred"), py::arg("grad_target"),
      py::arg("scale"), py::arg("grad_scale"), py::arg("grad"), py::arg("float64"));

  m.def(
      "attention_stats_forward",
      [](const MapShape& shape, const FeatureTuple& x, const BufferTuple& attention, const BufferTuple& mean,
         bool float64) {
        AttentionStats p;
        p.shape = shape, p.x = feature(x, "x", shape, float64),
        p.attention = required(attention, "attention", shape.batch * shape.pixels, compute_code(float64)),
        p.mean = required(mean, "mean", shape.batch * shape.channels, compute_code(float64));
        p.float64 = float64;
        py::gil_scoped_release release;
        selected->attention_stats_forward(p);
      },
      py::arg("shape"), py::arg("x"), py::arg("attention"), py::arg("mean"), py::arg("float64"));

  m.def(
      "attention_stats_backward",
      [](const MapShape& shape, const FeatureTuple& x, const FeatureTuple& grad_x, const BufferTuple& grad_attention,
         const BufferTuple& grad_mean, bool float64) {
        AttentionStats p;
        p.shape = shape, p.x = feature(x, "x", shape, float64),
        p.grad_x = optional_feature(grad_x, "grad_x", shape, float64, true);
        p.grad_attention = wanted(grad_attention, "grad_attention", shape.batch * shape.pixels, compute_code(float64)),
        p.grad_mean = wanted(grad_mean, "grad_mean", shape.batch * shape.channels, compute_code(float64)),
        p.float64 = float64;
        py::gil_scoped_release release;
        selected->attention_stats_backward(p);
      },
      py::arg("shape"), py::arg("x"), py::arg("grad_x"), py::arg("grad_attention"), py::arg("grad_mean"),
      py::arg("float64"));

  m.def(
      "sum_taps",
      [](const BufferTuple& table, const BufferTuple& slot, const BufferTuple& bias, const BufferTuple& out,
         int64_t height, int64_t width, int64_t channels, int threads) {
        SumTaps p;
        const int64_t kept = std::get<2>(table) / (9 * (channels > 0 ? channels : 1));
        require(height >= 0 && width >= 0 && channels > 0, "shape", "expected no negative size, and channels");
        p.table = static_cast<const float*>(required(table, "table", kept * 9 * channels, kFloat32));
        p.slot = static_cast<const int64_t*>(required(slot, "slot", height * width, kInt64));
        p.bias = static_cast<const float*>(required(bias, "bias", channels, kFloat32));
        p.out = static_cast<float*>(required(out, "out", height * width * channels, kFloat32));
        for (int64_t i = 0; i < height * width; ++i) require(p.slot[i] < kept, "slot", "expected rows of the table");
        p.height = height, p.width = width, p.channels = channels, p.threads = threads;
        py::gil_scoped_release release;
        selected->sum_taps(p);
      },
      py::arg("table"), py::arg("slot"), py::arg("bias"), py::arg("out"), py::arg("height"), py::arg("width"),
      py::arg("channels"), py::arg("threads"));

  m.def(
      "streaming_difference",
      [](uintptr_t a, uintptr_t b, uintptr_t out, int64_t count, int threads) {
        require((a && b && out) || count <= 0, "a, b, out", "expected addresses, got none");
        py::gil_scoped_release release;
        selected->streaming_difference(static_cast<const float*>(pointer(a)), static_cast<const float*>(pointer(b)),
                                       static_cast<float*>(pointer(out)), count, threads);
      },
      py::arg("a"), py::arg("b"), py::arg("out"), py::arg("count"), py::arg("threads"),
      "out = a - b over float32, written past the caches: the floor of the benchmarks.");
}
