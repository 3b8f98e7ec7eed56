// Every kernel, compiled for one instruction set (flags in CMakeLists.txt).
#define TRILEMMA_SIMD_AVX512
#define TRILEMMA_SIMD_BF16
#define TRILEMMA_SIMD_AMX
#include "kernels.inc"

namespace trilemma {
TRILEMMA_TABLE(kernels_amx, "amx")
}
