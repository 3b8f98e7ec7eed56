// Every kernel, compiled for one instruction set (flags in CMakeLists.txt).
#define TRILEMMA_SIMD_AVX2
#define TRILEMMA_SIMD_AVXVNNI
#include "kernels.inc"

namespace trilemma {
#if defined(TRILEMMA_EVEX)
extern const Kernels kernels_avxvnni_evex;  // of the tests alone
TRILEMMA_TABLE(kernels_avxvnni_evex, "avxvnni as AVX-512 encodes it")
#else
TRILEMMA_TABLE(kernels_avxvnni, "avxvnni")
#endif
}
