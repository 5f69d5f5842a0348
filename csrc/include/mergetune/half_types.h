// Storage types of half precision, without arithmetic.
#pragma once

#include <cstdint>

namespace mergetune {

// The upper half of a float.
struct BFloat16 {
    std::uint16_t bits;
};

// IEEE binary16.
struct Half {
    std::uint16_t bits;
};

}  // namespace mergetune
