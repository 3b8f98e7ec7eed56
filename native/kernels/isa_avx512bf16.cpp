// Every kernel, compiled for one instruction set (flags in CMakeLists.txt).
#define TRILEMMA_SIMD_AVX512
#define TRILEMMA_SIMD_BF16
#include "kernels.inc"

namespace trilemma {
TRILEMMA_TABLE(kernels_avx512bf16, "avx512bf16")
}
