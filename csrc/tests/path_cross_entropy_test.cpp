// Tests of path_cross_entropy without Python, for use with sanitizers: every CPU variant, and the CUDA kernels compiled
// for the CPU, against a naive loop.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

#define MT_VARIANT test
#include "mergetune/path_cross_entropy.h"
#include "mergetune/row_math.h"
#include "tests/harness.h"

namespace {

using mergetune::PathCrossEntropy;
using std::int64_t;

const std::string cuda = "cuda on the host";  // among the names of variants

template <class T>
struct Result {
    std::vector<double> loss;
    std::vector<T> d_dots, d_rscale;

    bool same_bits(const Result& other) const {
        return ::same_bits(loss, other.loss) && ::same_bits(d_dots, other.d_dots) &&
               ::same_bits(d_rscale, other.d_rscale);
    }
};

// One problem, its memory sized exactly so that a read past any end is caught.
template <class T>
struct Problem {
    int64_t K, B, C, P, stride_b, stride_m;
    std::vector<T> dots, rscale;
    std::vector<int64_t> labels, anchor;
    std::vector<double> alpha, weight;

    Problem(int64_t K, int64_t B, int64_t C, int64_t P, double size, int64_t gap)
        : K(K), B(B), C(C), P(P), stride_b(C + gap), stride_m(stride_b * B + gap) {
        std::mt19937_64 random(std::uint64_t(((K * 997 + B) * 997 + C) * 997 + P));
        std::uniform_real_distribution<double> signed_unit(-1, 1), unit(0, 1);
        dots.resize(std::size_t(stride_m * K + stride_b * (B - 1) + C));
        rscale.resize(std::size_t(P * C));
        for (T& x : dots) x = T(signed_unit(random));
        for (T& x : rscale) x = T(size * (0.5 + unit(random)));
        for (int64_t b = 0; b < B; ++b) labels.push_back(int64_t(random() % std::uint64_t(C)));
        for (int64_t p = 0; p < P; ++p) {
            anchor.push_back(int64_t(random() % std::uint64_t(K + 1)));
            alpha.push_back(p == 0 ? 1.0 : p == 1 ? 0.0 : unit(random));
            weight.push_back(unit(random));
        }
    }

    Result<T> run(int threads, const std::string& variant) const {
        const T nan = std::numeric_limits<T>::quiet_NaN();  // what is not written shows
        Result<T> out{std::vector<double>(std::size_t(P), double(nan)), std::vector<T>(std::size_t(B * C), nan),
                      std::vector<T>(std::size_t(P * C), nan)};
        const PathCrossEntropy<T> op = {
            dots.data(),  stride_m,      stride_b,      labels.data(),   anchor.data(),
            alpha.data(), weight.data(), rscale.data(), out.loss.data(), out.d_dots.data(),
            out.d_rscale.data(), K, B, C, P};
        if (variant == cuda) {
            mergetune::path_cross_entropy_cuda(op, nullptr);
        } else {
            mergetune::path_cross_entropy_cpu(op, threads, variant);
        }
        return out;
    }

    Result<double> naive() const {
        Result<double> out{std::vector<double>(std::size_t(P)), std::vector<double>(std::size_t(B * C)),
                           std::vector<double>(std::size_t(P * C))};
        std::vector<double> dot(static_cast<std::size_t>(C)), logit(static_cast<std::size_t>(C));
        for (int64_t p = 0; p < P; ++p) {
            const double a = anchor[p] ? alpha[p] : 1.0;
            for (int64_t b = 0; b < B; ++b) {
                double largest = -INFINITY, sum = 0;
                for (int64_t c = 0; c < C; ++c) {
                    const int64_t at = b * stride_b + c;
                    dot[c] = (1 - a) * double(dots[anchor[p] * stride_m + at]) + a * double(dots[at]);
                    logit[c] = dot[c] * double(rscale[p * C + c]);
                    largest = std::max(largest, logit[c]);
                }
                for (int64_t c = 0; c < C; ++c) sum += std::exp(logit[c] - largest);
                out.loss[p] += (std::log(sum) + largest - logit[labels[b]]) / double(B);
                for (int64_t c = 0; c < C; ++c) {
                    const double g =
                        weight[p] / double(B) * (std::exp(logit[c] - largest) / sum - (c == labels[b] ? 1 : 0));
                    out.d_dots[b * C + c] += g * a * double(rscale[p * C + c]);
                    out.d_rscale[p * C + c] += g * dot[c];
                }
            }
        }
        return out;
    }
};

// Relative to the largest value, or to `size` where that is more: softmax - onehot of a row that is all but certain is
// the difference of two numbers near 1.
template <class A, class B>
double largest_difference(const std::vector<A>& ours, const std::vector<B>& truth, double size) {
    double apart = 0;
    for (std::size_t i = 0; i < ours.size(); ++i) {
        if (!std::isfinite(double(ours[i]))) return INFINITY;
        apart = std::max(apart, std::abs(double(ours[i]) - double(truth[i])));
        size = std::max(size, std::abs(double(truth[i])));
    }
    return apart / size;
}

template <class T>
void compare(const std::string& variant, int64_t K, int64_t B, int64_t C, int64_t P, double size, int64_t gap) {
    const std::string name = variant + (sizeof(T) == 4 ? " float32" : " float64") + " K=" + std::to_string(K) +
                             " B=" + std::to_string(B) + " C=" + std::to_string(C) + " P=" + std::to_string(P) +
                             " size=" + std::to_string(size) + " gap=" + std::to_string(gap);
    const Problem<T> problem(K, B, C, P, size, gap);
    const auto ours = problem.run(1, variant);
    const auto truth = problem.naive();
    // A rounding of the largest logit moves every probability by that much, so the tolerance grows with the logits.
    const double tolerance = std::numeric_limits<T>::epsilon() * (20 + 4 * size);
    expect(largest_difference(ours.loss, truth.loss, 1) < tolerance, name + ": loss");
    expect(largest_difference(ours.d_dots, truth.d_dots, size / double(B)) < tolerance, name + ": d_dots");
    expect(largest_difference(ours.d_rscale, truth.d_rscale, 1) < tolerance, name + ": d_rscale");
    expect(ours.same_bits(problem.run(2, variant)), name + ": two runs, on one thread and on two, differ");
    if (variant != cuda) expect(ours.same_bits(problem.run(5, variant)), name + ": one thread and five differ");
}

template <class T>
void path_cross_entropy_values(const std::string& variant) {
    for (int64_t B : {1, 2, 3, 7, 33}) {
        for (int64_t C : {1, 2, 3, 7, 33, 500}) {
            for (int64_t P : {1, 2, 3, 7}) compare<T>(variant, P % 4, B, C, P, 10, 0);
        }
    }
    compare<T>(variant, 3, 33, 33, 33, 100, 5);
    compare<T>(variant, 1, 300, 64, 2, 1, 1);
    compare<T>(variant, 1, 1100, 17, 3, 30, 0);  // more than 64 blocks of 16 rows
    compare<T>(variant, 2, 19, 40, 5, 1e4, 0);
}

// Few and small: each launch starts 256 threads.
template <class T>
void path_cross_entropy_on_cuda() {
    compare<T>(cuda, 0, 1, 1, 1, 10, 0);
    compare<T>(cuda, 3, 9, 33, 3, 10, 0);
    compare<T>(cuda, 1, 2, 300, 2, 100, 0);
    compare<T>(cuda, 2, 11, 70, 5, 1e4, 3);
}

template <class T>
void path_cross_entropy_nan(const std::string& variant) {
    Problem<T> problem(1, 5, 20, 3, 10, 0);
    problem.anchor = {0, 1, 1};
    problem.dots[2 * 20 + 3] = std::numeric_limits<T>::quiet_NaN();  // w, row 2
    const auto out = problem.run(1, variant);
    for (int64_t p : {0, 2}) expect(std::isnan(out.loss[p]), variant + ": NaN gives a NaN loss");
    expect(std::isnan(out.d_dots[2 * 20 + 7]), variant + ": NaN reaches its row's gradient");
    expect(std::isfinite(double(out.d_dots[1 * 20 + 7])), variant + ": NaN stays in its row");
}

void refuses(const std::string& expected, const std::string& variant, void (*spoil)(Problem<float>&)) {
    Problem<float> problem(2, 4, 6, 3, 10, 0);
    spoil(problem);
    expect_refusal(expected, [&] { problem.run(1, variant); });
}

void errors() {
    refuses("labels must lie in [0, 5], got 6 at index 2", "", [](auto& problem) { problem.labels[2] = 6; });
    refuses("labels must lie in [0, 5], got -1 at index 0", "", [](auto& problem) { problem.labels[0] = -1; });
    refuses("anchor must lie in [0, 2], got 3 at index 1", "", [](auto& problem) { problem.anchor[1] = 3; });
    refuses("variant must be one of the CPU variants built (portable", "sse9", [](auto&) {});
}

void exponential() {
    double worst = 0;
    for (float x = 0; x > -87.3f; x -= 1.7e-4f) {
        const double truth = std::exp(double(x));
        const double ulp = std::ldexp(1.0, std::ilogb(truth) - 23);
        worst = std::max(worst, std::abs(double(mergetune::test::exp_nonpositive(x)) - truth) / ulp);
    }
    std::printf("exp_nonpositive: at most %.2f ulp from exp\n", worst);
    expect(worst < 1.5, "exp_nonpositive is off by more than 1.5 ulp");
    expect(mergetune::test::exp_nonpositive(0.0f) == 1.0f, "exp(0) is 1");
    for (float x : {-88.0f, -1e4f, -3e38f, -INFINITY}) {
        expect(mergetune::test::exp_nonpositive(x) == 0.0f, "exp of far below is 0");
    }
    expect(std::isnan(mergetune::test::exp_nonpositive(NAN)), "exp(NaN) is NaN");
}

}  // namespace

int main() {
    exponential();
    errors();
    test_each_variant([](const std::string& variant) {
        path_cross_entropy_values<float>(variant);
        path_cross_entropy_values<double>(variant);
        path_cross_entropy_nan<float>(variant);
        path_cross_entropy_nan<double>(variant);
    });
    path_cross_entropy_on_cuda<float>();
    path_cross_entropy_on_cuda<double>();
    path_cross_entropy_nan<float>(cuda);
    path_cross_entropy_nan<double>(cuda);
    std::printf("tested: %s\n", cuda.c_str());
    return finish("path_cross_entropy_test");
}
