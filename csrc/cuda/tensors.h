// From PyTorch tensors (stable ABI) to the plain description that kernels take, with the checks
// that memory safety needs.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "cpu/api.h"

namespace mmae {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& z) {
  switch (z.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: break;
  }
  STD_TORCH_CHECK(false, "mmae_fast: z must be float32, float64, bfloat16 or float16");
}

inline ScalarType accumulation_type(const Tensor& z) {
  return z.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// z (..., n, d) of any strides; mask (..., n) or none.
inline Features describe(const Tensor& z, const std::optional<Tensor>& mask, bool normalize,
                         bool center) {
  const int64_t dims = z.dim();
  STD_TORCH_CHECK(dims >= 2 && dims - 2 <= kMaxBatchDims,
                  "mmae_fast: z must be (..., n, d) with at "
                  "most ",
                  kMaxBatchDims, " leading dimensions, got ", dims, " dimensions");
  Features f{};
  f.z = z.const_data_ptr();
  f.dtype = dtype_of(z);
  f.n = z.size(dims - 2);
  f.d = z.size(dims - 1);
  f.row_stride = z.stride(dims - 2);
  f.column_stride = z.stride(dims - 1);
  f.normalize = normalize;
  f.center = center;
  f.batch = 1;
  f.batch_dims = int(dims - 2);
  for (int i = 0; i < f.batch_dims; ++i) {
    f.batch_sizes[i] = z.size(i);
    f.z_strides[i] = z.stride(i);
    f.batch *= z.size(i);
  }
  if (!mask) return f;
  STD_TORCH_CHECK(mask->dim() == dims - 1 && mask->scalar_type() == ScalarType::Bool,
                  "mmae_fast: mask must be bool with the shape of z without its last dimension");
  STD_TORCH_CHECK(mask->get_device_index() == z.get_device_index(),
                  "mmae_fast: mask and z must be on the same device");
  for (int i = 0; i < dims - 1; ++i)
    STD_TORCH_CHECK(mask->size(i) == z.size(i), "mmae_fast: mask and z disagree in dimension ", i);
  f.mask = static_cast<const bool*>(mask->const_data_ptr());
  for (int i = 0; i < f.batch_dims; ++i) f.mask_strides[i] = mask->stride(i);
  f.mask_stride = mask->stride(dims - 2);
  return f;
}

// A new tensor of z's batch shape and more, on z's device, in the given type.
inline Tensor empty(const Tensor& z, ScalarType type, std::vector<int64_t> tail) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 2 < z.dim(); ++i) shape.push_back(z.size(i));
  shape.insert(shape.end(), tail.begin(), tail.end());
  return torch::stable::new_empty(z, shape, type);
}

}  // namespace mmae
