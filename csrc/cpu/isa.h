// The choice of an instruction set, when the library is loaded.
#pragma once

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/dtype.h"

namespace trimtab {

// TRIMTAB_CPU_ISA names a narrower set than the processor has: for tests, and for the same bits on
// different machines.
inline bool allowed(const char* isa) {
  const char* asked = std::getenv("TRIMTAB_CPU_ISA");
  return !asked || !*asked || std::strcmp(asked, isa) == 0;
}

inline void refuse_unless_allowed(const char* isa) {
  if (!allowed(isa))
    throw std::runtime_error(
        "TRIMTAB_CPU_ISA must be generic, avx2, avx512 or avx512bf16 and what this processor has, "
        "got " +
        std::string(std::getenv("TRIMTAB_CPU_ISA")) + "; unset it for the widest");
}

#if defined(__x86_64__)
// A family has one table of functions per instruction set, with its name; few have products of
// bfloat16 pairs.
template <class Table>
const Table& table_for_this_processor(const Table& generic, const Table& avx2, const Table& avx512,
                                      const Table* avx512bf16 = nullptr) {
  __builtin_cpu_init();
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (wide && __builtin_cpu_supports("avx512bf16") && allowed("avx512bf16"))
    return avx512bf16 ? *avx512bf16 : avx512;
  if (wide && allowed(avx512.name)) return avx512;
  if (allowed(avx2.name) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return avx2;
  refuse_unless_allowed(generic.name);
  return generic;
}
#endif

// The functions of a family's table for one type of element.
template <class Element, class Table>
const auto& functions_of(const Table& table) {
  if constexpr (std::is_same_v<Element, float>)
    return table.float32;
  else if constexpr (std::is_same_v<Element, double>)
    return table.float64;
  else if constexpr (std::is_same_v<Element, BFloat16>)
    return table.bfloat16;
  else
    return table.float16;
}

}  // namespace trimtab
