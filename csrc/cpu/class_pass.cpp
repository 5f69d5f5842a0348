// The class passes on the CPU: choice of the variant, and sum of the surrogates over classes.
#include "cpu/class_pass_kernel.h"

#include <algorithm>
#include <vector>

#include "cpu/variants.h"

namespace mergetune {
namespace {

// A team costs a few microseconds to wake; a small call is done before that.
int team(std::int64_t values, int num_threads) { return values < (1 << 16) ? 1 : std::max(1, num_threads); }

}  // namespace

template <class T>
void path_scales_cpu(const ClassWeights<T>& op, T* rscale, double* products, int num_threads,
                     const std::string& requested) {
    const std::string& variant = choose_cpu_variant(requested);
    const int threads = team((op.K + 1) * op.C * op.D, num_threads);
    MT_CALL_VARIANT(variant, path_scales(op, rscale, products, threads));
}

template <class T>
void class_gradient_cpu(const ClassWeights<T>& op, const T* rscale, const T* d_rscale, const double* products,
                        double lam, T* grad, double* surrogate, int num_threads, const std::string& requested) {
    const std::string& variant = choose_cpu_variant(requested);
    const int threads = team((op.K + 2) * op.C * op.D, num_threads);
    std::vector<double> surrogates(std::size_t(op.C), 0.0);
    MT_CALL_VARIANT(variant, class_gradient(op, rscale, d_rscale, products, lam, grad, surrogates.data(), threads));
    double sum = 0;
    for (const double value : surrogates) sum += value;
    *surrogate = sum / double(op.C);
}

#define MT_INSTANTIATE(T)                                                                                         \
    template void path_scales_cpu<T>(const ClassWeights<T>&, T*, double*, int, const std::string&);               \
    template void class_gradient_cpu<T>(const ClassWeights<T>&, const T*, const T*, const double*, double, T*,    \
                                        double*, int, const std::string&);
MT_INSTANTIATE(float)
MT_INSTANTIATE(double)
#undef MT_INSTANTIATE

}  // namespace mergetune
