#include "dispatch.h"

#include <cstdlib>

#include "config.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace trilemma {
namespace {

struct Support {
  bool avx2 = false, avxvnni = false, avx512 = false, avx512bf16 = false, amx = false, neon = false;
};

#if defined(__x86_64__)
// What the operating system saves on a context switch; cpuid alone does not tell.
unsigned long long saved_state() {
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<unsigned long long>(high) << 32) | low;
}

// The system gives a process the tiles' registers when asked: 8 KB more for every thread that uses them. It refuses where a
// thread has an alternate signal stack too small to hold them.
bool allow_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

Support detect() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return {};
  const bool osxsave = c & bit_OSXSAVE, fma = c & bit_FMA, f16c = c & bit_F16C, avx = c & bit_AVX;
  if (!osxsave || !avx) return {};
  const unsigned long long state = saved_state();
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return {};
  Support s;
  s.avx2 = (state & 6) == 6 && fma && f16c && (b & bit_AVX2);
  const unsigned needed = bit_AVX512F | bit_AVX512BW | bit_AVX512VL | bit_AVX512DQ;
  s.avx512 = s.avx2 && (state & 0xe6) == 0xe6 && (b & needed) == needed && (c & bit_AVX512VNNI);
  constexpr unsigned kAmx = 1u << 22 | 1u << 24 | 1u << 25, kTileState = 3u << 17;  // bf16, tiles, int8
  const bool tiles = (d & kAmx) == kAmx && (state & kTileState) == kTileState;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return s;
  s.avxvnni = s.avx2 && (a & bit_AVXVNNI);
  s.avx512bf16 = s.avx512 && (a & bit_AVX512BF16);
  s.amx = s.avx512bf16 && tiles && allow_tiles();
  return s;
}
#elif defined(__aarch64__)
// sdot came with ARMv8.2; every Apple processor of this architecture has it.
Support detect() {
  Support s;
#if defined(__linux__)
  s.neon = getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
  s.neon = true;
#endif
  return s;
}
#else
Support detect() { return {}; }
#endif

const Support& support() {
  static const Support found = detect();
  return found;
}

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names{"scalar"};
  if (support().avx2) names.push_back("avx2");
  if (support().avxvnni) names.push_back("avxvnni");
  if (support().avx512) names.push_back("avx512");
  if (support().avx512bf16) names.push_back("avx512bf16");
  if (support().amx) names.push_back("amx");
  if (support().neon) names.push_back("neon");
  return names;
}

const Kernels& pick_kernels(const std::string& asked) {
  std::string name = asked;
  if (name.empty())
    if (const char* variable = std::getenv("TRILEMMA_ISA")) name = variable;
  if (name.empty()) name = supported_isas().back();
  std::string valid;
  for (const std::string& isa : supported_isas()) {
    valid += (valid.empty() ? "" : ", ") + isa;
    if (isa != name) continue;
#if defined(__x86_64__)
    if (name == "amx") return kernels_amx;
    if (name == "avx512bf16") return kernels_avx512bf16;
    if (name == "avx512") return kernels_avx512;
    if (name == "avxvnni") return kernels_avxvnni;
    if (name == "avx2") return kernels_avx2;
#elif defined(__aarch64__)
    if (name == "neon") return kernels_neon;
#endif
    return kernels_scalar;
  }
  bool known = false;
  for (const char* isa : {"avx2", "avxvnni", "avx512", "avx512bf16", "amx", "neon"}) known |= name == isa;
  throw EngineFault("Instruction set '" + name + "' " + (known ? "is not supported by this processor" : "is unknown") +
                    ". Usable here: " + valid + ".");
}

}  // namespace trilemma
