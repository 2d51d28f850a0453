// Registration of the compiled CUDA kernels with PyTorch, on its stable ABI, as a library of its
// own: mmae_fast._C_cuda is loaded when the backend "cuda" is asked for, and needs no CUDA library
// at load time (the runtime is linked statically). Here are the checks that memory safety needs;
// the choice between these kernels and PyTorch's is in mmae_fast/cuda_backend.py.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <Python.h>
#include <dlfcn.h>

#include <tuple>

#include "cuda/api.h"
#include "cuda/tensors.h"

namespace {

using namespace mmae;

// PyTorch's current stream. Its accessor lives in libtorch_cuda, which a PyTorch without CUDA does
// not have: it is looked up among the loaded libraries at the first launch.
void* current_stream(int32_t device) {
  using Accessor = AOTITorchError (*)(int32_t, void**);
  static const Accessor accessor = []() -> Accessor {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Accessor>(symbol);
  }();
  STD_TORCH_CHECK(accessor != nullptr, "mmae_fast: this PyTorch has no CUDA support");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(accessor(device, &stream));
  return stream;
}

cuda::Queue queue_of(const Tensor& z) {
  const int32_t device = z.get_device_index();
  return {device, current_stream(device)};
}

void check_launch(const char* error, const char* name) {
  STD_TORCH_CHECK(error == nullptr, "mmae_fast::", name, ": ", error ? error : "");
}

void check_order(const Tensor& z, int64_t k, const char* name) {
  const int64_t limit = cuda::max_order(dtype_of(z));
  STD_TORCH_CHECK(k <= limit, "mmae_fast::", name, ": min(n, d) must be at most ", limit,
                  " for this dtype, got ", k);
}

// An empty tensor stands for a weight that nobody wants.
Tensor new_weight(const Tensor& z, const Features& f, bool wanted) {
  if (wanted) return empty(z, accumulation_type(z), {f.k(), f.k()});
  return torch::stable::new_empty(z, {0}, accumulation_type(z));
}

std::tuple<Tensor, Tensor> coding_rate(const Tensor& z, const std::optional<Tensor>& mask,
                                       double scale, bool normalize, bool center,
                                       bool need_weight) {
  const Features f = describe(z, mask, normalize, center);
  check_order(z, f.k(), "cuda_coding_rate");
  Tensor value = empty(z, accumulation_type(z), {}), weight = new_weight(z, f, need_weight);
  if (f.batch > 0)
    check_launch(cuda::coding_rate(f, scale, value.mutable_data_ptr(),
                                   need_weight ? weight.mutable_data_ptr() : nullptr, queue_of(z)),
                 "cuda_coding_rate");
  return {value, weight};
}

std::tuple<Tensor, Tensor> renyi2(const Tensor& z, const std::optional<Tensor>& mask,
                                  bool normalize, bool center, bool need_weight) {
  const Features f = describe(z, mask, normalize, center);
  check_order(z, f.k(), "cuda_renyi2");
  Tensor value = empty(z, accumulation_type(z), {}), weight = new_weight(z, f, need_weight);
  if (f.batch > 0)
    check_launch(cuda::renyi2(f, value.mutable_data_ptr(),
                              need_weight ? weight.mutable_data_ptr() : nullptr, queue_of(z)),
                 "cuda_renyi2");
  return {value, weight};
}

std::tuple<Tensor, Tensor, Tensor> gram(const Tensor& z, const std::optional<Tensor>& mask,
                                        bool samples, bool normalize, bool center) {
  const Features f = describe(z, mask, normalize, center);
  const int64_t k = samples ? f.n : f.d;
  const ScalarType type = accumulation_type(z);
  Tensor g = empty(z, type, {k, k}), scale = empty(z, type, {f.n}), mean = empty(z, type, {f.d});
  if (f.batch > 0)
    check_launch(cuda::gram(f, samples, g.mutable_data_ptr(), scale.mutable_data_ptr(),
                            mean.mutable_data_ptr(), queue_of(z)),
                 "cuda_gram");
  return {g, scale, mean};
}

Tensor weight_bwd(const Tensor& grad, const Tensor& z, const std::optional<Tensor>& mask,
                  const Tensor& weight, bool normalize, bool center) {
  const Features f = describe(z, mask, normalize, center);
  const ScalarType type = accumulation_type(z);
  if (!f.samples()) check_order(z, f.d, "cuda_weight_bwd");
  STD_TORCH_CHECK(
      weight.is_contiguous() && weight.numel() == f.batch * f.k() * f.k() &&
          weight.scalar_type() == type && weight.get_device_index() == z.get_device_index(),
      "mmae_fast::cuda_weight_bwd: weight must be contiguous, (..., k, k), on z's device");
  STD_TORCH_CHECK(
      grad.is_contiguous() && grad.numel() == f.batch && grad.scalar_type() == type &&
          grad.get_device_index() == z.get_device_index(),
      "mmae_fast::cuda_weight_bwd: grad must be contiguous, one value per matrix, on z's "
      "device");
  Tensor grad_z = empty(z, z.scalar_type(), {f.n, f.d});
  const int64_t rows = f.samples() ? 0 : f.n, columns = f.samples() ? 0 : f.d;
  Tensor scale = empty(z, type, {rows}), mean = empty(z, type, {columns});
  if (grad_z.numel() > 0)
    check_launch(cuda::weight_bwd(f, grad.const_data_ptr(), weight.const_data_ptr(),
                                  scale.mutable_data_ptr(), mean.mutable_data_ptr(),
                                  grad_z.mutable_data_ptr(), queue_of(z)),
                 "cuda_weight_bwd");
  return grad_z;
}

int64_t max_order(bool is_double) {
  return cuda::max_order(is_double ? DType::kFloat64 : DType::kFloat32);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mmae_fast, m) {
  m.def(
      "cuda_coding_rate(Tensor z, Tensor? mask, float scale, bool normalize, bool center, "
      "bool need_weight) -> (Tensor value, Tensor weight)");
  m.def(
      "cuda_renyi2(Tensor z, Tensor? mask, bool normalize, bool center, bool need_weight) -> "
      "(Tensor value, Tensor weight)");
  m.def(
      "cuda_gram(Tensor z, Tensor? mask, bool samples, bool normalize, bool center) -> "
      "(Tensor gram, Tensor scale, Tensor mean)");
  m.def(
      "cuda_weight_bwd(Tensor grad, Tensor z, Tensor? mask, Tensor weight, bool normalize, "
      "bool center) -> Tensor");
  m.def("cuda_max_order(bool is_double) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(mmae_fast, CUDA, m) {
  m.impl("cuda_coding_rate", TORCH_BOX(&coding_rate));
  m.impl("cuda_renyi2", TORCH_BOX(&renyi2));
  m.impl("cuda_gram", TORCH_BOX(&gram));
  m.impl("cuda_weight_bwd", TORCH_BOX(&weight_bwd));
}

STABLE_TORCH_LIBRARY_IMPL(mmae_fast, CompositeExplicitAutograd, m) {
  m.impl("cuda_max_order", TORCH_BOX(&max_order));
}

// An importable (empty) module, as in ops.cpp.
PyMODINIT_FUNC PyInit__C_cuda(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
