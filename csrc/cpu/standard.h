// The standard headers of the kernels. They come before any target pragma, so that the inline
// functions in them are compiled for the baseline and can be shared between translation units.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "api.h"
