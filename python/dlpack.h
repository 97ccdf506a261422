// Memory of the pool as PyTorch tensors: through DLPack, whose layout is fixed, so that no Torch header is needed.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <vector>

#include "common.h"
#include "memory_pool.h"

namespace maskd {

// The part of DLPack's ABI that is used here, https://dmlc.github.io/dlpack/latest/c_api.html
namespace dlpack {

struct Tensor {
  void* data;
  struct Device {
    int32_t type, id;
  } device;
  int32_t dimensions;
  struct DataType {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};

constexpr int32_t kCpu = 1;
constexpr uint8_t kFloat = 2, kBFloat = 4;
constexpr const char* kCapsule = "dltensor";  // whoever takes the tensor over renames the capsule

}  // namespace dlpack

// An uninitialised tensor, as a capsule that `torch.utils.dlpack.from_dlpack` takes. Strides count elements; none:
// contiguous.
inline pybind11::capsule new_tensor(std::vector<int64_t> shape, std::vector<int64_t> strides, DType dtype) {
  struct Owner {
    dlpack::ManagedTensor managed;  // first: both have the same address
    std::vector<int64_t> shape, strides;
    Block block;
  };
  if (!strides.empty() && strides.size() != shape.size())
    throw std::invalid_argument("strides: expected one per size, or none");
  int64_t bytes = size_of(dtype), last = 0;
  for (size_t i = 0; i < shape.size(); ++i) {
    if (shape[i] < 0 || __builtin_mul_overflow(bytes, shape[i], &bytes))
      throw std::invalid_argument("shape: expected sizes whose product is a number of bytes");
    if (!strides.empty()) last += (shape[i] - 1) * strides[i];
  }
  if (bytes > 0 && (last < 0 || (last + 1) * size_of(dtype) > bytes))
    throw std::invalid_argument("strides: expected those of a dense tensor");
  Owner* owner = new Owner{{}, std::move(shape), std::move(strides), Block(bytes)};
  dlpack::Tensor& tensor = owner->managed.tensor;
  tensor.data = owner->block.data();
  tensor.device = {dlpack::kCpu, 0};
  tensor.dimensions = int32_t(owner->shape.size());
  tensor.dtype = {dtype == DType::bfloat16 ? dlpack::kBFloat : dlpack::kFloat, uint8_t(8 * size_of(dtype)), 1};
  tensor.shape = owner->shape.data(), tensor.strides = owner->strides.empty() ? nullptr : owner->strides.data();
  owner->managed.deleter = [](dlpack::ManagedTensor* managed) { delete reinterpret_cast<Owner*>(managed); };
  return pybind11::capsule(&owner->managed, dlpack::kCapsule, [](PyObject* capsule) {
    if (PyCapsule_IsValid(capsule, dlpack::kCapsule)) {
      auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, dlpack::kCapsule));
      managed->deleter(managed);
    }
  });
}

}  // namespace maskd
