// SSE2 on x86-64, NEON on arm64: whatever every machine of the architecture has.
#include "standard.h"

#define MMAE_ISA baseline
#define MMAE_ISA_NAME "baseline"
#define MMAE_VECTOR_BYTES 16
#include "kernels.inl"
