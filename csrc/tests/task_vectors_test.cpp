// Tests of the task-vector kernels without Python, for use with sanitizers: every CPU variant against a plain loop, at
// sizes around the block size, with arrays that end at the end of their memory.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "mergetune/task_vectors.h"
#include "tests/harness.h"

namespace {

using std::int64_t;

using mergetune::BFloat16;
using mergetune::Half;
using mergetune::Real;

template <class Value>
void test_merge(const std::string& variant, int64_t K, int64_t n, unsigned options) {
    using T = Real<Value>;
    const bool based = options & 1, masked = options & 2, limited = options & 4, elected = options & 8,
               by_count = options & 16, divided = options & 32;
    std::mt19937_64 random(std::uint64_t(K * 10007 + n * 101 + options));
    const auto draw = [&] { return double(int(random() % 63) - 31) / 8; };  // exact in every type
    std::vector<Value> base(n);
    std::vector<std::vector<Value>> experts(K, std::vector<Value>(n));
    std::vector<double> base_truth(n), truths(K * n);
    std::vector<T> out(n, std::numeric_limits<T>::quiet_NaN());
    std::vector<std::uint8_t> kept(K * n);
    std::vector<double> limits(K), weights(K), votes(K), shares(K);
    for (int64_t i = 0; i < n; ++i) base[i] = stored<Value>(base_truth[i] = draw());
    for (int64_t k = 0; k < K; ++k) {
        for (int64_t i = 0; i < n; ++i) experts[k][i] = stored<Value>(truths[k * n + i] = draw());
    }
    std::vector<const Value*> rows;
    for (const auto& expert : experts) rows.push_back(expert.data());
    for (auto& x : kept) x = draw() > 0;
    for (int64_t k = 0; k < K; ++k) {
        limits[k] = 1 + 0.5 * double(k);
        weights[k] = 1 + 0.25 * double(k);
        votes[k] = 1;
        shares[k] = 0.5 * double(k);
    }
    const mergetune::TaskVectors<Value> op{
        based ? base.data() : nullptr,     rows.data(),
        masked ? kept.data() : nullptr,    limited ? limits.data() : nullptr,
        weights.data(),                    elected ? votes.data() : nullptr,
        divided ? shares.data() : nullptr, by_count,
        0.75,                              K,
        n};
    mergetune::merge_deltas_cpu(op, out.data(), variant);
    for (int64_t i = 0; i < n; ++i) {
        std::vector<double> deltas;
        double vote = 0, sum = 0, divisor = 0;
        for (int64_t k = 0; k < K; ++k) {
            double delta = truths[k * n + i] - (based ? base_truth[i] : 0);
            if (limited && std::abs(delta) < limits[k]) delta = 0;
            if (masked && !kept[k * n + i]) delta = 0;
            deltas.push_back(delta);
            vote += by_count ? double((delta > 0) - (delta < 0)) : delta;
        }
        for (int64_t k = 0; k < K; ++k) {
            if (elected && (vote >= 0 ? deltas[k] <= 0 : deltas[k] >= 0)) continue;
            sum += weights[k] * deltas[k];
            divisor += elected && divided ? shares[k] : 0;
        }
        const double truth = (based ? base_truth[i] : 0) + 0.75 * (divisor != 0 ? sum / divisor : sum);
        const double error = std::abs(double(out[i]) - truth);
        expect(error <= (sizeof(T) == 4 ? 1e-5 : 1e-13),
               variant + ": merge_deltas, K " + std::to_string(K) + ", n " + std::to_string(n) + ", options " +
                   std::to_string(options) + ", element " + std::to_string(i) + " is off by " + std::to_string(error));
    }
}

template <class Value>
void test_count(const std::string& variant, int64_t n, double low, double high, bool based) {
    using T = Real<Value>;
    std::mt19937_64 random{std::uint64_t(n)};
    const auto draw = [&] { return double(int(random() % 41) - 20); };
    std::vector<Value> values, base;
    std::vector<T> between(n), truth;
    int64_t counts[4] = {-1, -1, -1, -1}, expected[4] = {0, 0, 0, 0};
    for (int64_t i = 0; i < n; ++i) {
        const double value = draw(), start = draw(), x = based ? std::abs(value - start) : value;
        values.push_back(stored<Value>(value));
        base.push_back(stored<Value>(start));
        expected[0] += x < low;
        expected[1] += x == low;
        expected[3] += x == high && low != high;
        if (x > low && x < high) truth.push_back(T(x));
    }
    expected[2] = int64_t(truth.size());
    mergetune::count_around_cpu(values.data(), based ? base.data() : nullptr, n, T(low), T(high), counts,
                                between.data(), variant);
    between.resize(truth.size());
    expect(std::equal(counts, counts + 4, expected) && between == truth,
           variant + ": count_around, n " + std::to_string(n) + ", low " + std::to_string(low));
}

// Every half is widened to the number that it means, and NaN stays NaN.
void test_halves(const std::string& variant) {
    std::vector<Half> values;
    for (unsigned bits = 0; bits < 65536; ++bits) values.push_back({std::uint16_t(bits)});
    const Half* const row = values.data();
    const double one = 1;
    std::vector<float> out(values.size());
    const mergetune::TaskVectors<Half> op{nullptr, &row, nullptr, nullptr, &one, nullptr,
                                          nullptr, false, 1, 1, int64_t(values.size())};
    mergetune::merge_deltas_cpu(op, out.data(), variant);
    for (unsigned bits = 0; bits < 65536; ++bits) {
        const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
        double truth = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
        if (exponent == 31) truth = fraction ? std::nan("") : std::numeric_limits<double>::infinity();
        if (bits & 0x8000) truth = -truth;
        expect(std::isnan(truth) ? std::isnan(out[bits]) : double(out[bits]) == truth,
               variant + ": half " + std::to_string(bits) + " is " + std::to_string(out[bits]));
    }
}

}  // namespace

int main() {
    test_each_variant([](const std::string& variant) {
        const double infinity = std::numeric_limits<double>::infinity();
        for (const int64_t n : {1, 31, 512, 1100}) {
            for (const int64_t K : {1, 3, 9}) {
                for (unsigned options = 0; options < 64; ++options) {
                    test_merge<float>(variant, K, n, options);
                    test_merge<double>(variant, K, n, options);
                    test_merge<Half>(variant, K, n, options);
                    test_merge<BFloat16>(variant, K, n, options);
                }
            }
            for (const double low : {-infinity, -20.0, 3.0}) {
                for (const double high : {3.0, 5.5, infinity}) {
                    for (const bool based : {false, true}) {
                        test_count<float>(variant, n, low, high, based);
                        test_count<double>(variant, n, low, high, based);
                        test_count<Half>(variant, n, low, high, based);
                        test_count<BFloat16>(variant, n, low, high, based);
                    }
                }
            }
        }
        test_halves(variant);
    });
    return finish("task_vectors_test");
}
