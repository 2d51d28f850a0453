// The vendor's batched eigensolver, cusolverDnXsyevBatched (CUDA 12.6.2 or newer), without its
// headers and without linking to it: the symbols are looked up in a library that the process has
// loaded already (mmae_fast/backends/cuda_backend.py sees to that).
#include <dlfcn.h>

#include <map>
#include <vector>

#include "launcher.cuh"

namespace mmae {
namespace cuda {

namespace {

// cusolver_common.h and library_types.h.
constexpr int kSuccess = 0, kNoVectors = 0, kVectors = 1, kLower = 0, kFloat = 0, kDouble = 1;
using Handle = void*;
using Params = void*;

struct Library {
  int (*create)(Handle*) = nullptr;
  int (*create_params)(Params*) = nullptr;
  int (*set_stream)(Handle, cudaStream_t) = nullptr;
  int (*buffer_size)(Handle, Params, int, int, int64_t, int, const void*, int64_t, int, const void*,
                     int, size_t*, size_t*, int64_t) = nullptr;
  int (*syev)(Handle, Params, int, int, int64_t, int, void*, int64_t, int, void*, int, void*,
              size_t, void*, size_t, int*, int64_t) = nullptr;
  bool whole = false;

  Library() {
    for (const char* name : {"libcusolver.so.12", "libcusolver.so.11"}) {
      void* handle = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
      if (!handle) continue;
      whole = find(handle, "cusolverDnCreate", create) &&
              find(handle, "cusolverDnCreateParams", create_params) &&
              find(handle, "cusolverDnSetStream", set_stream) &&
              find(handle, "cusolverDnXsyevBatched_bufferSize", buffer_size) &&
              find(handle, "cusolverDnXsyevBatched", syev);
      if (whole) return;
    }
  }

  template <class F>
  static bool find(void* handle, const char* name, F& function) {
    function = reinterpret_cast<F>(dlsym(handle, name));
    return function != nullptr;
  }
};

// Looked for anew until it is there: the process may load it later.
const Library* library() {
  static Library found;
  if (!found.whole) found = Library();
  return found.whole ? &found : nullptr;
}

struct Context {
  Handle handle = nullptr;
  Params params = nullptr;
};

// Of this thread and device; never destroyed, as the driver may be gone before static objects are.
Context* context_of(const Library& lib, int device) {
  thread_local std::map<int, Context>* contexts = new std::map<int, Context>;
  Context& c = (*contexts)[device];
  if (!c.handle && lib.create(&c.handle) != kSuccess) return nullptr;
  if (!c.params && lib.create_params(&c.params) != kSuccess) return nullptr;
  return &c;
}

}  // namespace

bool has_solver() { return library() != nullptr; }

const char* eigh(const Eigh& e, Queue queue, size_t* device_bytes) {
  const Library* lib = library();
  if (!lib) return "no libcusolver with cusolverDnXsyevBatched is loaded";
  CudaLauncher guard(queue);
  if (guard.error()) return guard.error();
  Context* c = context_of(*lib, queue.device);
  if (!c) return "cusolverDnCreate failed";
  if (lib->set_stream(c->handle, static_cast<cudaStream_t>(queue.stream)) != kSuccess)
    return "cusolverDnSetStream failed";
  const int type = e.dtype == DType::kFloat64 ? kDouble : kFloat;
  const int job = e.want_vectors ? kVectors : kNoVectors;
  size_t on_device = 0, on_host = 0;
  if (lib->buffer_size(c->handle, c->params, job, kLower, e.k, type, e.a, e.k, type, e.lam, type,
                       &on_device, &on_host, e.batch) != kSuccess)
    return "cusolverDnXsyevBatched_bufferSize failed";
  if (!e.work) {
    *device_bytes = on_device;
    return nullptr;
  }
  thread_local std::vector<char>* host = new std::vector<char>;
  if (host->size() < on_host) host->resize(on_host);
  if (*device_bytes < on_device ||
      lib->syev(c->handle, c->params, job, kLower, e.k, type, e.a, e.k, type, e.lam, type, e.work,
                *device_bytes, host->data(), on_host, e.info, e.batch) != kSuccess)
    return "cusolverDnXsyevBatched failed";
  return nullptr;
}

}  // namespace cuda
}  // namespace mmae
