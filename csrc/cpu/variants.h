// Instruction sets (variants) for which the CPU kernels were built, and the one that this process uses.
#pragma once

#include <string>
#include <vector>

namespace mergetune {

// Built variants, plainest first: "portable", then "avx2" and "avx512" on x86-64.
const std::vector<std::string>& cpu_variants();

// True if this variant was built and this processor can run it.
bool cpu_variant_runs(const std::string& variant);

// The variant that runs when none is named: MERGETUNE_CPU if set, else the widest that this processor has.
// Throws std::invalid_argument if MERGETUNE_CPU names one that was not built or cannot run here.
const std::string& cpu_variant();

// `requested`, checked, or cpu_variant() where it is empty.
const std::string& choose_cpu_variant(const std::string& requested);

}  // namespace mergetune
