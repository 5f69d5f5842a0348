// Checks of arguments, with messages for users. Files that are compiled once per variant must not include this.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace mergetune {

inline void check_at_least(const char* name, std::int64_t least, std::int64_t value) {
    if (value >= least) return;
    throw std::invalid_argument(std::string(name) + " must be at least " + std::to_string(least) + ", got " +
                                std::to_string(value));
}

inline void check_range(const char* name, const std::int64_t* values, std::int64_t count, std::int64_t low,
                        std::int64_t high) {
    for (std::int64_t i = 0; i < count; ++i) {
        if (values[i] < low || values[i] > high) {
            throw std::invalid_argument(std::string(name) + " must lie in [" + std::to_string(low) + ", " +
                                        std::to_string(high) + "], got " + std::to_string(values[i]) + " at index " +
                                        std::to_string(i));
        }
    }
}

}  // namespace mergetune
