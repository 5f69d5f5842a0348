// Choice of the CPU kernels' instruction set at run time.
#include "cpu/variants.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

namespace mergetune {

const std::vector<std::string>& cpu_variants() {
    static const std::vector<std::string> built = {
        "portable",
#ifdef MERGETUNE_WITH_X86
        "avx2",
        "avx512",
#endif
    };
    return built;
}

static bool processor_has([[maybe_unused]] const std::string& variant) {
#ifdef MERGETUNE_WITH_X86
    // These ask the operating system too: wide registers that it does not save cannot be used.
    // Every processor with AVX2 converts half types too (F16C).
    if (variant == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (variant == "avx512") {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("fma");
    }
#endif
    return true;
}

// The built variant of this name; throws if there is none or this processor lacks it.
static const std::string& checked(const std::string& variant, const std::string& argument) {
    const auto& built = cpu_variants();
    const auto found = std::find(built.begin(), built.end(), variant);
    if (found == built.end()) {
        std::string names;
        for (const auto& name : built) names += (names.empty() ? "" : ", ") + name;
        throw std::invalid_argument(argument + " must be one of the CPU variants built (" + names + "), got '" +
                                    variant + "'");
    }
    if (!processor_has(variant)) {
        throw std::invalid_argument(argument + " must be a CPU variant that this processor can run, got '" + variant +
                                    "'");
    }
    return *found;
}

bool cpu_variant_runs(const std::string& variant) {
    const auto& built = cpu_variants();
    return std::find(built.begin(), built.end(), variant) != built.end() && processor_has(variant);
}

const std::string& cpu_variant() {
    // A throw leaves the static uninitialised, so every later call reports the same mistake again.
    static const std::string& chosen = []() -> const std::string& {
        const char* forced = std::getenv("MERGETUNE_CPU");
        if (forced && *forced) return checked(forced, "MERGETUNE_CPU");
        const auto& built = cpu_variants();
        return *std::find_if(built.rbegin(), built.rend(), processor_has);
    }();
    return chosen;
}

const std::string& choose_cpu_variant(const std::string& requested) {
    return requested.empty() ? cpu_variant() : checked(requested, "variant");
}

}  // namespace mergetune
