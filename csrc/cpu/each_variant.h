// Macros that declare functions in every CPU variant and call the function of one variant.
#pragma once

// Declares the same functions in the namespace of each variant.
#define MT_DECLARE_IN_EACH_VARIANT(...) \
    namespace portable {                \
    __VA_ARGS__                         \
    }                                   \
    namespace avx2 {                    \
    __VA_ARGS__                         \
    }                                   \
    namespace avx512 {                  \
    __VA_ARGS__                         \
    }

// Makes a call in the namespace of the variant of this name, as in MT_CALL_VARIANT("avx2", f(x)) for avx2::f(x).
#ifdef MERGETUNE_WITH_X86
#define MT_CALL_VARIANT(variant, ...)     \
    do {                                  \
        if ((variant) == "avx512") {      \
            avx512::__VA_ARGS__;          \
        } else if ((variant) == "avx2") { \
            avx2::__VA_ARGS__;            \
        } else {                          \
            portable::__VA_ARGS__;        \
        }                                 \
    } while (false)
#else
#define MT_CALL_VARIANT(variant, ...) \
    do {                              \
        static_cast<void>(variant);   \
        portable::__VA_ARGS__;        \
    } while (false)
#endif
