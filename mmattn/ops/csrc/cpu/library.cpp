// Registers the CPU kernels of the best instruction set that this processor has. Schemas are in Python.
#include "../common.h"

#include <cstdlib>
#include <cstring>
#include <string>

#define MMATTN_ISA baseline
#include "operators.h"
#undef MMATTN_ISA
#ifdef MMATTN_X86
#define MMATTN_ISA avx2
#include "operators.h"
#undef MMATTN_ISA
#define MMATTN_ISA avx512
#include "operators.h"
#undef MMATTN_ISA
#endif

#define OPERATOR(isa, name)                          \
  m.impl(#name, TORCH_BOX(&mmattn::isa::name));       \
  m.impl(#name "_backward", TORCH_BOX(&mmattn::isa::name##_backward))

#define REGISTER(isa)                     \
  OPERATOR(isa, deform_attention);        \
  OPERATOR(isa, deform_sample);           \
  OPERATOR(isa, neighborhood_attention);  \
  OPERATOR(isa, quadtree_level);          \
  OPERATOR(isa, window_attention)

namespace {

// The best one that the processor has, or that MMATTN_ISA names in the environment, if it has that.
std::string instruction_set() {
  const char* wanted = std::getenv("MMATTN_ISA");
  const auto may_use = [&](const char* isa) {
    return wanted == nullptr || std::strcmp(wanted, isa) == 0;
  };
#ifdef MMATTN_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl");
  if (avx512 && may_use("avx512")) return "avx512";
  if (avx2 && may_use("avx2")) return "avx2";
#endif
  return "baseline";
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmattn, CPU, m) {
  const std::string isa = instruction_set();
#ifdef MMATTN_X86
  if (isa == "avx512") {
    REGISTER(avx512);
    return;
  }
  if (isa == "avx2") {
    REGISTER(avx2);
    return;
  }
#endif
  REGISTER(baseline);
}

STABLE_TORCH_LIBRARY_IMPL(mmattn, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
}
