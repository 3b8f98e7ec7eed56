// The table of avxvnni for hosts with AVX-512, see CMakeLists.txt.
#define TRILEMMA_EVEX
#include "kernels/isa_avxvnni.cpp"
