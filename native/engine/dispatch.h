// Which instruction sets this processor and operating system allow, and the kernels of the chosen one.
#pragma once

#include <string>
#include <vector>

#include "../kernels/table.h"

namespace trilemma {

// Names, slowest first: scalar, avx2, avxvnni, avx512, avx512bf16, amx; on ARM scalar, neon.
std::vector<std::string> supported_isas();

// `name` empty: TRILEMMA_ISA if set, else the fastest. Throws EngineFault when it is unknown or the host lacks it.
const Kernels& pick_kernels(const std::string& name);

}  // namespace trilemma
