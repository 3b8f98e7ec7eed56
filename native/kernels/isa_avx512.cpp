// Every kernel, compiled for one instruction set (flags in CMakeLists.txt).
#define TRILEMMA_SIMD_AVX512
#include "kernels.inc"

namespace trilemma {
TRILEMMA_TABLE(kernels_avx512, "avx512")
}
