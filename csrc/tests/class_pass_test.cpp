// Tests of the class passes without Python, for use with sanitizers: every CPU variant against central differences of a
// naive objective.
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "mergetune/class_pass.h"
#include "tests/harness.h"

namespace {

using mergetune::ClassWeights;
using std::int64_t;

// One problem in double, its memory sized exactly so that a read past any end is caught.
struct Problem {
    int64_t K, C, D, P;
    bool normalize, curved;
    std::vector<double> w, anchors, w1, curvature, alpha, d_rscale;
    std::vector<int64_t> anchor;

    Problem(int64_t K, int64_t C, int64_t D, int64_t P, bool normalize, bool curved)
        : K(K), C(C), D(D), P(P), normalize(normalize), curved(curved) {
        std::mt19937_64 random(std::uint64_t(((K * 97 + C) * 97 + D) * 97 + P));
        std::uniform_real_distribution<double> signed_unit(-1, 1), unit(0, 1);
        const auto fill = [&](std::vector<double>& values, int64_t count) {
            for (int64_t i = 0; i < count; ++i) values.push_back(signed_unit(random));
        };
        fill(w, C * D);
        fill(anchors, K * C * D);
        fill(w1, C * D);
        fill(d_rscale, P * C);
        for (int64_t i = 0; i < C * D; ++i) curvature.push_back(unit(random));
        for (int64_t p = 0; p < P; ++p) {
            anchor.push_back(int64_t(random() % std::uint64_t(K + 1)));
            alpha.push_back(anchor.back() ? unit(random) : 1.0);
        }
    }

    // sum d_rscale rscale + lam S at these class weights
    double naive(const std::vector<double>& at, double lam) const {
        double total = 0;
        for (int64_t c = 0; c < C; ++c) {
            for (int64_t p = 0; p < P; ++p) {
                double square = 0;
                for (int64_t d = 0; d < D; ++d) {
                    const double end = at[c * D + d], a = anchor[p] ? anchors[((anchor[p] - 1) * C + c) * D + d] : end;
                    const double t = (1 - alpha[p]) * a + alpha[p] * end;
                    square += t * t;
                }
                total += d_rscale[p * C + c] * (normalize ? 7 / std::sqrt(square) : 7);
            }
            double length = 0, length_1 = 0;
            for (int64_t d = 0; d < D; ++d) {
                length += at[c * D + d] * at[c * D + d];
                length_1 += w1[c * D + d] * w1[c * D + d];
            }
            for (int64_t d = 0; d < D; ++d) {
                const double apart = normalize
                                         ? at[c * D + d] / std::sqrt(length) - w1[c * D + d] / std::sqrt(length_1)
                                         : at[c * D + d] - w1[c * D + d];
                total += lam / (2 * double(C)) * (curved ? curvature[c * D + d] : 1) * apart * apart;
            }
        }
        return total;
    }
};

template <class T>
std::vector<T> run(const Problem& problem, double lam, int threads, const std::string& variant) {
    const auto as = [](const std::vector<double>& from) { return std::vector<T>(from.begin(), from.end()); };
    const auto w = as(problem.w), anchors = as(problem.anchors), w1 = as(problem.w1), h = as(problem.curvature),
               d_rscale = as(problem.d_rscale);
    const ClassWeights<T> op{w.data(), anchors.data(), w1.data(), problem.curved ? h.data() : nullptr,
                             problem.anchor.data(), problem.alpha.data(), 7, problem.normalize,
                             problem.K, problem.C, problem.D, problem.P};
    std::vector<T> rscale(d_rscale.size(), std::numeric_limits<T>::quiet_NaN()), grad(w.size(), T(0));
    std::vector<double> products(std::size_t(problem.C * (1 + 2 * problem.K)));
    double surrogate = std::nan("");
    mergetune::path_scales_cpu(op, rscale.data(), products.data(), threads, variant);
    mergetune::class_gradient_cpu(op, rscale.data(), d_rscale.data(), products.data(), lam, grad.data(), &surrogate,
                                  threads, variant);
    expect(std::isfinite(surrogate), variant + ": the surrogate is finite");
    return grad;
}

template <class T>
void compare(const std::string& variant, const Problem& problem) {
    const double lam = 3, step = 1e-5;
    const auto ours = run<T>(problem, lam, 1, variant);
    const double tolerance = sizeof(T) == 4 ? 1e-3 : 1e-6;
    for (std::size_t i = 0; i < ours.size(); i += 5) {
        auto up = problem.w, down = problem.w;
        up[i] += step;
        down[i] -= step;
        const double truth = (problem.naive(up, lam) - problem.naive(down, lam)) / (2 * step);
        expect(std::abs(double(ours[i]) - truth) <= tolerance * (1 + std::abs(truth)),
               variant + ": gradient of w[" + std::to_string(i) + "] is " + std::to_string(double(ours[i])) +
                   ", not " + std::to_string(truth));
    }
    const auto again = run<T>(problem, lam, 3, variant);
    expect(same_bits(ours, again), variant + ": one thread and three differ");
}

}  // namespace

int main() {
    test_each_variant([](const std::string& variant) {
        for (const bool normalize : {true, false}) {
            for (const bool curved : {true, false}) {
                for (const auto& problem :
                     {Problem(0, 1, 1, 1, normalize, curved), Problem(1, 3, 7, 4, normalize, curved),
                      Problem(3, 5, 33, 9, normalize, curved), Problem(2, 300, 90, 3, normalize, curved)}) {
                    compare<float>(variant, problem);
                    if (problem.C < 10) compare<double>(variant, problem);
                }
            }
        }
    });
    return finish("class_pass_test");
}
