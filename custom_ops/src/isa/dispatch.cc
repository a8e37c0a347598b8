#include "isa/dispatch.h"

#include <cstdlib>
#include <cstring>

#include "native/export.h"

#if defined(OCTAVO_X86_64)
#include <cpuid.h>
#elif defined(OCTAVO_AARCH64) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace octavo {

extern const Kernels kernels_scalar;

namespace {

struct Isa {
  const Kernels* kernels;
  bool (*available)();
  const char* family = "";  // OCTAVO_ISA may name it instead: the best of the family is taken
};

bool always() { return true; }

#if defined(OCTAVO_X86_64)

struct Features {
  bool avx2, avxvnni, avx512, avx512vnni;
};

// cpuid tells what the processor can do, xgetbv which registers the operating system saves: both are needed.
Features detect() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return {};
  const bool osxsave = c & bit_OSXSAVE, avx = c & bit_AVX, fma = c & bit_FMA, f16c = c & bit_F16C;
  if (!osxsave || !avx || !fma || !f16c) return {};
  unsigned low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned ymm = 0x6, zmm = 0xe0;  // XCR0: SSE and AVX state; opmask and both halves of the zmm registers
  if ((low & ymm) != ymm || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return {};
  const bool avx2 = b & bit_AVX2;
  const bool wide = (b & bit_AVX512F) && (b & bit_AVX512BW) && (b & bit_AVX512DQ) && (b & bit_AVX512VL);
  const bool avx512 = avx2 && wide && (low & zmm) == zmm;
  const bool avx512vnni = avx512 && (c & bit_AVX512VNNI);
  constexpr unsigned bit_avxvnni = 1u << 4;  // of eax in sub-leaf 1
  const bool avxvnni = avx2 && a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & bit_avxvnni);
  return {avx2, avxvnni, avx512, avx512vnni};
}

const Features& features() {
  static const Features found = detect();
  return found;
}

}  // namespace

extern const Kernels kernels_avx2, kernels_avxvnni, kernels_avx512bw, kernels_avx512vnni;

namespace {

bool has_avx2() { return features().avx2; }
bool has_avxvnni() { return features().avxvnni; }
bool has_avx512bw() { return features().avx512; }
bool has_avx512vnni() { return features().avx512vnni; }

constexpr Isa kIsas[] = {
    {&kernels_avx512vnni, has_avx512vnni, "avx512"},
    {&kernels_avx512bw, has_avx512bw, "avx512"},
    {&kernels_avxvnni, has_avxvnni},
    {&kernels_avx2, has_avx2},
    {&kernels_scalar, always},
};

#elif defined(OCTAVO_AARCH64)

}  // namespace

extern const Kernels kernels_neon;

namespace {

bool has_neon() {
#ifdef __linux__
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
  return true;  // every Apple M has dot products
#endif
}

constexpr Isa kIsas[] = {{&kernels_neon, has_neon}, {&kernels_scalar, always}};

#else

constexpr Isa kIsas[] = {{&kernels_scalar, always}};

#endif

struct Choice {
  const Kernels* kernels;
  Status status;
};

Choice choose() {
  const char* asked = std::getenv("OCTAVO_ISA");
  const bool any = asked == nullptr || *asked == 0;
  bool known = false;
  for (const Isa& isa : kIsas) {
    const bool meant = any || std::strcmp(asked, isa.kernels->name) == 0 || std::strcmp(asked, isa.family) == 0;
    known = known || meant;
    if (meant && isa.available()) return {isa.kernels, Status::ok()};
  }
  if (known) return {nullptr, Status::invalid("OCTAVO_ISA is '%.64s', which this processor or operating system does not have", asked)};
  return {nullptr, Status::invalid("OCTAVO_ISA is '%.64s'; this build knows scalar; on x86-64 avx2, avxvnni, avx512, avx512bw and avx512vnni; on AArch64 neon", asked)};
}

const Choice& choice() {
  static const Choice made = choose();
  return made;
}

}  // namespace

Status active_kernels(const Kernels** out) {
  *out = choice().kernels;
  return choice().status;
}

}  // namespace octavo

// The name of the instruction set in use; where OCTAVO_ISA can't be met, nullptr.
OCTAVO_EXPORT const char* octavo_active_isa() {
  const octavo::Kernels* kernels = octavo::choice().kernels;
  return kernels != nullptr ? kernels->name : nullptr;
}

// The names that this machine can run, best first: entry `index`, nullptr past the end.
OCTAVO_EXPORT const char* octavo_available_isa(int index) {
  for (const octavo::Isa& isa : octavo::kIsas) {
    if (isa.available() && index-- == 0) return isa.kernels->name;
  }
  return nullptr;
}
