// Every kernel, compiled for one instruction set (flags in CMakeLists.txt).
#define TRILEMMA_SIMD_AVX2
#include "kernels.inc"

namespace trilemma {
TRILEMMA_TABLE(kernels_avx2, "avx2")
}
