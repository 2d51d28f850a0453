// Registration of the compiled CUDA kernels with PyTorch, on its stable ABI, as a library of its
// own: mmae_fast._C_cuda is loaded when the backend "cuda" is asked for, and needs no CUDA library
// at load time (the runtime is linked statically). Here are the checks that memory safety needs;
// the choice between these kernels and PyTorch's is in mmae_fast/backends/cuda_backend.py.
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

void check_order(int64_t order, int64_t limit, const char* name) {
  STD_TORCH_CHECK(order <= limit, "mmae_fast::", name, ": the smaller side must be at most ", limit,
                  " for this quantity, dtype and device, got ", order);
}

// An empty tensor stands for a weight that nobody wants.
Tensor new_weight(const Tensor& z, const Features& f, bool wanted) {
  if (wanted) return empty(z, accumulation_type(z), {f.k(), f.k()});
  return torch::stable::new_empty(z, {0}, accumulation_type(z));
}

// value, and weight if it is wanted, of the coding rate or an entropy of z.
std::tuple<Tensor, Tensor> measure(const Tensor& z, const std::optional<Tensor>& mask,
                                   cuda::Measure m, bool normalize, bool center, bool need_weight,
                                   const char* name) {
  const Features f = describe(z, mask, normalize, center);
  check_order(f.k(), cuda::max_order(f.dtype, m, z.get_device_index()), name);
  const ScalarType type = accumulation_type(z);
  Tensor value = empty(z, type, {}), weight = new_weight(z, f, need_weight);
  if (f.batch == 0) return {value, weight};
  const bool whole = cuda::needs_scratch(f.dtype, f.k(), m);
  const int64_t k = whole ? f.k() : 0, n = whole ? f.n : 0, d = whole ? f.d : 0;
  Tensor g = empty(z, type, {k, k}), scale = empty(z, type, {n}), mean = empty(z, type, {d});
  Tensor along = empty(z, type, {n}), common = empty(z, type, {whole ? 1 : 0});
  const cuda::Scratch scratch{whole ? g.mutable_data_ptr() : nullptr, scale.mutable_data_ptr(),
                              mean.mutable_data_ptr(), along.mutable_data_ptr(),
                              common.mutable_data_ptr()};
  check_launch(
      cuda::measure(f, m, value.mutable_data_ptr(),
                    need_weight ? weight.mutable_data_ptr() : nullptr, scratch, queue_of(z)),
      name);
  return {value, weight};
}

std::tuple<Tensor, Tensor> coding_rate(const Tensor& z, const std::optional<Tensor>& mask,
                                       double scale, bool normalize, bool center, bool need_weight,
                                       bool tf32) {
  return measure(z, mask, {true, scale, 0, tf32}, normalize, center, need_weight,
                 "cuda_coding_rate");
}

std::tuple<Tensor, Tensor> entropy(const Tensor& z, const std::optional<Tensor>& mask, double alpha,
                                   bool normalize, bool center, bool need_weight, bool tf32) {
  return measure(z, mask, {false, 0, alpha, tf32}, normalize, center, need_weight, "cuda_entropy");
}

std::tuple<Tensor, Tensor> gram_entropy(const Tensor& g, double alpha, bool need_weight) {
  const int64_t dims = g.dim();
  STD_TORCH_CHECK(dims >= 2 && g.is_contiguous() && g.size(dims - 1) == g.size(dims - 2) &&
                      g.scalar_type() == accumulation_type(g),
                  "mmae_fast::cuda_gram_entropy: g must be contiguous, (..., k, k), float32 or "
                  "float64");
  const Features f = describe(g, std::nullopt, false, false);
  const cuda::Measure m{false, 0, alpha, false};
  check_order(f.n, cuda::max_order(f.dtype, m, g.get_device_index()), "cuda_gram_entropy");
  Tensor value = empty(g, g.scalar_type(), {}), weight = new_weight(g, f, need_weight);
  if (f.batch > 0)
    check_launch(cuda::gram_entropy(f.dtype, f.batch, f.n, g.const_data_ptr(), alpha,
                                    value.mutable_data_ptr(),
                                    need_weight ? weight.mutable_data_ptr() : nullptr, queue_of(g)),
                 "cuda_gram_entropy");
  return {value, weight};
}

std::tuple<Tensor, Tensor, Tensor> gram(const Tensor& z, const std::optional<Tensor>& mask,
                                        bool samples, bool normalize, bool center, bool tf32) {
  const Features f = describe(z, mask, normalize, center);
  const int64_t k = samples ? f.n : f.d;
  const ScalarType type = accumulation_type(z);
  Tensor g = empty(z, type, {k, k}), scale = empty(z, type, {f.n}), mean = empty(z, type, {f.d});
  if (f.batch > 0)
    check_launch(cuda::gram(f, samples, tf32, g.mutable_data_ptr(), scale.mutable_data_ptr(),
                            mean.mutable_data_ptr(), queue_of(z)),
                 "cuda_gram");
  return {g, scale, mean};
}

Tensor weight_bwd(const Tensor& grad, const Tensor& z, const std::optional<Tensor>& mask,
                  const Tensor& weight, bool normalize, bool center) {
  const Features f = describe(z, mask, normalize, center);
  const ScalarType type = accumulation_type(z);
  if (!f.samples()) check_order(f.d, cuda::max_columns(), "cuda_weight_bwd");
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

std::tuple<Tensor, Tensor> eigh(Tensor a, bool vectors) {
  const int64_t dims = a.dim();
  STD_TORCH_CHECK(dims >= 2 && a.is_contiguous() && a.size(dims - 1) == a.size(dims - 2) &&
                      a.scalar_type() == accumulation_type(a),
                  "mmae_fast::cuda_eigh_: a must be contiguous, (..., k, k), float32 or float64");
  const int64_t k = a.size(dims - 1);
  Tensor lam = empty(a, a.scalar_type(), {k}), info = empty(a, ScalarType::Int, {});
  if (a.numel() == 0) return {lam, info};
  size_t bytes = 0;
  cuda::Eigh e{dtype_of(a),
               a.numel() / (k * k),
               k,
               vectors,
               a.mutable_data_ptr(),
               lam.mutable_data_ptr(),
               nullptr,
               static_cast<int*>(info.mutable_data_ptr())};
  check_launch(cuda::eigh(e, queue_of(a), &bytes), "cuda_eigh_");
  Tensor work = torch::stable::new_empty(a, {int64_t(bytes) + 1}, ScalarType::Byte);
  e.work = work.mutable_data_ptr();
  check_launch(cuda::eigh(e, queue_of(a), &bytes), "cuda_eigh_");
  return {lam, info};
}

bool has_solver() { return cuda::has_solver(); }

int64_t max_order(bool is_rate, double alpha, bool is_double, int64_t device) {
  const DType dtype = is_double ? DType::kFloat64 : DType::kFloat32;
  return cuda::max_order(dtype, {is_rate, 0, alpha, false}, int(device));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mmae_fast, m) {
  m.def(
      "cuda_coding_rate(Tensor z, Tensor? mask, float scale, bool normalize, bool center, "
      "bool need_weight, bool tf32) -> (Tensor value, Tensor weight)");
  m.def(
      "cuda_entropy(Tensor z, Tensor? mask, float alpha, bool normalize, bool center, "
      "bool need_weight, bool tf32) -> (Tensor value, Tensor weight)");
  m.def(
      "cuda_gram_entropy(Tensor g, float alpha, bool need_weight) -> (Tensor value, Tensor "
      "weight)");
  m.def(
      "cuda_gram(Tensor z, Tensor? mask, bool samples, bool normalize, bool center, bool tf32) -> "
      "(Tensor gram, Tensor scale, Tensor mean)");
  m.def(
      "cuda_weight_bwd(Tensor grad, Tensor z, Tensor? mask, Tensor weight, bool normalize, "
      "bool center) -> Tensor");
  m.def("cuda_eigh_(Tensor(a!) a, bool vectors) -> (Tensor lam, Tensor info)");
  m.def("cuda_has_solver() -> bool");
  m.def("cuda_max_order(bool is_rate, float alpha, bool is_double, int device) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(mmae_fast, CUDA, m) {
  m.impl("cuda_coding_rate", TORCH_BOX(&coding_rate));
  m.impl("cuda_entropy", TORCH_BOX(&entropy));
  m.impl("cuda_gram_entropy", TORCH_BOX(&gram_entropy));
  m.impl("cuda_eigh_", TORCH_BOX(&eigh));
  m.impl("cuda_gram", TORCH_BOX(&gram));
  m.impl("cuda_weight_bwd", TORCH_BOX(&weight_bwd));
}

STABLE_TORCH_LIBRARY_IMPL(mmae_fast, CompositeExplicitAutograd, m) {
  m.impl("cuda_has_solver", TORCH_BOX(&has_solver));
  m.impl("cuda_max_order", TORCH_BOX(&max_order));
}

// An importable (empty) module, as in ops.cpp.
PyMODINIT_FUNC PyInit__C_cuda(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
