// Conversion of the addresses and dtype names that Python passes for tensors to typed pointers, with checks.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "mergetune/half_types.h"

namespace mergetune {

using Address = std::uintptr_t;

template <class T>
T* pointer(const char* name, Address address) {
    if (!address) throw std::invalid_argument(std::string(name) + " must be the address of a tensor's data, got 0");
    if (address % alignof(T)) {
        throw std::invalid_argument(std::string(name) + " must be a multiple of " + std::to_string(alignof(T)) +
                                    ", got " + std::to_string(address));
    }
    return reinterpret_cast<T*>(address);
}

// Null where the address is 0.
template <class T>
T* maybe(const char* name, Address address) {
    return address ? pointer<T>(name, address) : nullptr;
}

template <class T>
constexpr const char* dtype_name = nullptr;
template <>
constexpr const char* dtype_name<float> = "float32";
template <>
constexpr const char* dtype_name<double> = "float64";
template <>
constexpr const char* dtype_name<Half> = "float16";
template <>
constexpr const char* dtype_name<BFloat16> = "bfloat16";

// Calls run(T()) for that one of the types which `dtype` names.
template <class... Types, class Run>
void with_dtype(const std::string& dtype, Run run) {
    const bool found = ((dtype == dtype_name<Types> && (run(Types()), true)) || ...);
    if (found) return;
    std::string names;
    std::size_t left = sizeof...(Types);
    for (const char* name : {dtype_name<Types>...}) {
        names += std::string("'") + name + "'";
        --left;
        names += left > 1 ? ", " : left == 1 ? " or " : "";
    }
    throw std::invalid_argument("dtype must be " + names + ", got '" + dtype + "'");
}

}  // namespace mergetune
