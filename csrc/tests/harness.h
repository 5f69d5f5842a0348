// Shared parts of the core's tests: expectations, conversion of stored values, and the loop over the CPU variants.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/variants.h"
#include "mergetune/half_types.h"

inline int failures = 0;

inline void expect(bool truth, const std::string& what) {
    if (truth) return;
    ++failures;
    std::printf("FAILED: %s\n", what.c_str());
}

// Expects run() to throw std::invalid_argument with this text in its message.
template <class Run>
void expect_refusal(const std::string& expected, Run run) {
    try {
        run();
        expect(false, "nothing thrown, expected: " + expected);
    } catch (const std::invalid_argument& error) {
        expect(std::string(error.what()).find(expected) != std::string::npos,
               std::string("got '") + error.what() + "', expected: " + expected);
    }
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && (a.empty() || !std::memcmp(a.data(), b.data(), a.size() * sizeof(T)));
}

// A number as it is stored; one of too many digits is cut and not rounded.
template <class Value>
Value stored(double x) {
    return Value(x);
}
template <>
inline mergetune::BFloat16 stored<mergetune::BFloat16>(double x) {
    const float value = float(x);
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return {std::uint16_t(bits >> 16)};
}

template <>
inline mergetune::Half stored<mergetune::Half>(double x) {
    int exponent;
    const double fraction = std::frexp(std::abs(x), &exponent);  // in [1/2, 1), or 0
    const std::uint16_t sign = x < 0 ? 0x8000 : 0;
    if (fraction == 0) return {sign};
    return {std::uint16_t(sign | (exponent + 14) << 10 | (int(fraction * 2048) & 0x3ff))};
}

// Calls test(variant) for each CPU variant that this processor can run.
template <class Test>
void test_each_variant(Test test) {
    for (const std::string& variant : mergetune::cpu_variants()) {
        if (!mergetune::cpu_variant_runs(variant)) {
            std::printf("skipped: this processor has no %s\n", variant.c_str());
            continue;
        }
        test(variant);
        std::printf("tested: %s\n", variant.c_str());
    }
}

// Says how the tests of this name went; the exit status.
inline int finish(const char* name) {
    if (failures) {
        std::printf("%s: %d FAILED\n", name, failures);
    } else {
        std::printf("%s: all passed\n", name);
    }
    return failures ? 1 : 0;
}
