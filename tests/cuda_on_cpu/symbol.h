// The name of a function, for messages: kernels stand in anonymous namespaces, which only the full
// symbol table of the library lists.
#pragma once

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

namespace cuda_on_cpu {

inline std::string demangled(const char* name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  std::string result = status == 0 ? text : name;
  std::free(text);
  for (const std::string noise : {"(anonymous namespace)::", "void "})
    for (size_t at; (at = result.find(noise)) != std::string::npos;) result.erase(at, noise.size());
  // The types of the arguments are longer than what tells kernels apart.
  int depth = 0;
  for (size_t i = result.size(); i-- > 0;) {
    depth += result[i] == ')' ? 1 : result[i] == '(' ? -1 : 0;
    if (depth == 0 && result[i] == '(') return result.substr(0, i);
  }
  return result;
}

inline std::string name_of_function(const void* function) {
  Dl_info info;
  if (!dladdr(function, &info) || info.dli_fname == nullptr) return "?";
  std::ifstream file(info.dli_fname, std::ios::binary);
  const std::vector<char> image{std::istreambuf_iterator<char>(file), {}};
  if (image.size() < sizeof(Elf64_Ehdr)) return "?";
  const auto* header = reinterpret_cast<const Elf64_Ehdr*>(image.data());
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(image.data() + header->e_shoff);
  const auto offset = static_cast<const char*>(function) - static_cast<char*>(info.dli_fbase);
  for (int i = 0; i < header->e_shnum; ++i) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const char* names = image.data() + sections[sections[i].sh_link].sh_offset;
    const auto* symbols = reinterpret_cast<const Elf64_Sym*>(image.data() + sections[i].sh_offset);
    for (size_t s = 0; s < sections[i].sh_size / sizeof(Elf64_Sym); ++s)
      if (ELF64_ST_TYPE(symbols[s].st_info) == STT_FUNC &&
          symbols[s].st_value == static_cast<uint64_t>(offset))
        return demangled(names + symbols[s].st_name);
  }
  return "?";
}

}  // namespace cuda_on_cpu
