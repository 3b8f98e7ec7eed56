// Every kernel, compiled for one instruction set (flags in CMakeLists.txt).
#define TRILEMMA_SIMD_NEON
#include "kernels.inc"

namespace trilemma {
TRILEMMA_TABLE(kernels_neon, "neon")
}
