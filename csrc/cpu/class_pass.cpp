// The class passes on the CPU: chooses the variant, and adds up the classes' surrogates.
#include "class_pass_kernel.h"

#include <algorithm>
#include <vector>

#include "variants.h"

namespace mergetune {
namespace {

// A team costs a few microseconds to wake; a small call is done before that.
int team(std::int64_t values, int num_threads) { return values < (1 << 16) ? 1 : std::max(1, num_threads); }

}  // namespace

template <class T>
void path_scales_cpu(const ClassWeights<T>& op, T* rscale, double* products, int num_threads,
                     const std::string& requested) {
    [[maybe_unused]] const std::string& variant = choose_cpu_variant(requested);
    const int threads = team((op.K + 1) * op.C * op.D, num_threads);
#ifdef MERGETUNE_WITH_X86
    if (variant == "avx512") return avx512::path_scales(op, rscale, products, threads);
    if (variant == "avx2") return avx2::path_scales(op, rscale, products, threads);
#endif
    portable::path_scales(op, rscale, products, threads);
}

template <class T>
void class_gradient_cpu(const ClassWeights<T>& op, const T* rscale, const T* d_rscale, const double* products,
                        double lam, T* grad, double* surrogate, int num_threads, const std::string& requested) {
    [[maybe_unused]] const std::string& variant = choose_cpu_variant(requested);
    const int threads = team((op.K + 2) * op.C * op.D, num_threads);
    std::vector<double> surrogates(std::size_t(op.C), 0.0);
    const auto run = [&](auto pass) {
        pass(op, rscale, d_rscale, products, lam, grad, surrogates.data(), threads);
        double sum = 0;
        for (const double value : surrogates) sum += value;
        *surrogate = sum / double(op.C);
    };
#define MT_PASS(variant) [](auto&&... arguments) { variant::class_gradient(arguments...); }
#ifdef MERGETUNE_WITH_X86
    if (variant == "avx512") return run(MT_PASS(avx512));
    if (variant == "avx2") return run(MT_PASS(avx2));
#endif
    run(MT_PASS(portable));
#undef MT_PASS
}

#define MT_INSTANTIATE(T)                                                                                         \
    template void path_scales_cpu<T>(const ClassWeights<T>&, T*, double*, int, const std::string&);               \
    template void class_gradient_cpu<T>(const ClassWeights<T>&, const T*, const T*, const double*, double, T*,    \
                                        double*, int, const std::string&);
MT_INSTANTIATE(float)
MT_INSTANTIATE(double)
#undef MT_INSTANTIATE

}  // namespace mergetune
