// Tests of prefix_attention without Python, for use with sanitizers: every CPU variant against a naive loop.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "mergetune/prefix_attention.h"
#include "tests/harness.h"

namespace {

using mergetune::BFloat16;
using mergetune::Heads;
using mergetune::PrefixAttention;
using std::int64_t;

double real(double x) { return x; }
double real(BFloat16 x) {
    const std::uint32_t bits = std::uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return double(value);
}

// Relative error of one rounding.
template <class T>
constexpr double precision = std::numeric_limits<T>::epsilon();
template <>
constexpr double precision<BFloat16> = 1.0 / 256;

struct Sizes {
    int64_t M, S, H, d, gap;  // `gap` elements lie between heads, rows and prompts
    std::vector<int64_t> lengths;
    bool last_only, causal;
};

// A tensor [M, rows, H, d], its memory sized exactly so that an access past the end is caught.
template <class T>
struct Tensor {
    int64_t stride_h, stride_row, stride_m;
    std::vector<T> memory;

    Tensor(const Sizes& sizes, int64_t rows)
        : stride_h(sizes.d + sizes.gap),
          stride_row(stride_h * sizes.H + sizes.gap),
          stride_m(stride_row * rows + sizes.gap),
          memory(rows ? std::size_t(stride_m * (sizes.M - 1) + stride_row * (rows - 1) + stride_h * (sizes.H - 1) +
                                    sizes.d)
                      : 0,
                 stored<T>(double(std::numeric_limits<float>::quiet_NaN()))) {}  // what is not written shows

    const T* at(int64_t m, int64_t row, int64_t h) const {
        return memory.data() + m * stride_m + row * stride_row + h * stride_h;
    }
    T* at(int64_t m, int64_t row, int64_t h) { return const_cast<T*>(std::as_const(*this).at(m, row, h)); }
    Heads<const T> read() const { return {memory.data(), stride_m, stride_row, stride_h}; }
    Heads<T> write() { return {memory.data(), stride_m, stride_row, stride_h}; }
};

template <class T>
struct Problem {
    Sizes sizes;
    std::vector<int64_t> offsets{0};
    int64_t tokens, queries;

    explicit Problem(const Sizes& sizes) : sizes(sizes) {
        for (int64_t length : sizes.lengths) offsets.push_back(offsets.back() + length);
        tokens = offsets.back();
        queries = sizes.last_only ? int64_t(sizes.lengths.size()) : tokens;
    }

    // q, k, v, prefix_k, prefix_v, and then the output or its gradient.
    template <class U>
    std::vector<Tensor<U>> tensors() const {
        std::vector<Tensor<U>> all;
        for (int64_t rows : {queries, tokens, tokens, sizes.S, sizes.S, queries}) all.emplace_back(sizes, rows);
        return all;
    }

    std::vector<Tensor<T>> random(double size) const {
        std::mt19937_64 random(std::uint64_t(tokens * 997 + sizes.S * 31 + sizes.d));
        std::uniform_real_distribution<double> signed_unit(-1, 1);
        auto all = tensors<T>();
        for (auto& tensor : all) {
            for (T& x : tensor.memory) x = stored<T>(signed_unit(random) * (&tensor == &all.back() ? 1 : size));
        }
        return all;
    }

    // The five gradients, then the output.
    std::vector<Tensor<T>> run(const std::vector<Tensor<T>>& in, int threads, const std::string& variant) const {
        auto out = tensors<T>();
        const PrefixAttention<T> op = {in[0].read(),   in[1].read(),  in[2].read(), in[3].read(),
                                       in[4].read(),   offsets.data(), sizes.M,     queries,
                                       tokens,         sizes.S,       int64_t(offsets.size()) - 1,
                                       sizes.H,        sizes.d,       sizes.causal};
        mergetune::prefix_attention_cpu(op, out[5].write(), threads, variant);
        mergetune::prefix_attention_backward_cpu(
            op, in[5].read(),
            {out[0].write(), out[1].write(), out[2].write(), out[3].write(), out[4].write()}, threads, variant);
        return out;
    }

    std::vector<Tensor<double>> naive(const std::vector<Tensor<T>>& in) const {
        auto out = tensors<double>();
        for (auto& tensor : out) std::fill(tensor.memory.begin(), tensor.memory.end(), 0.0);
        const double scale = 1 / std::sqrt(double(sizes.d));
        for (std::size_t c = 0; c + 1 < offsets.size(); ++c) {
            const int64_t length = sizes.lengths[c];
            for (int64_t m = 0; m < sizes.M; ++m) {
                for (int64_t h = 0; h < sizes.H; ++h) {
                    for (int64_t i = sizes.last_only ? length - 1 : 0; i < length; ++i) {
                        const int64_t row = sizes.last_only ? int64_t(c) : offsets[c] + i;
                        query(in, out, m, h, row, offsets[c], sizes.causal ? i + 1 : length, scale);
                    }
                }
            }
        }
        return out;
    }

   private:
    void query(const std::vector<Tensor<T>>& in, std::vector<Tensor<double>>& out, int64_t m, int64_t h, int64_t row,
               int64_t begin, int64_t seen, double scale) const {
        const int64_t S = sizes.S, d = sizes.d;
        const T* const q = in[0].at(m, row, h);
        const T* const d_out = in[5].at(m, row, h);
        const auto key = [&](auto& all, int64_t j) {
            return j < S ? all[3].at(m, j, h) : all[1].at(m, begin + j - S, h);
        };
        const auto val = [&](auto& all, int64_t j) {
            return j < S ? all[4].at(m, j, h) : all[2].at(m, begin + j - S, h);
        };
        std::vector<double> p(std::size_t(S + seen), 0.0), slope(std::size_t(S + seen), 0.0);
        double largest = -INFINITY, sum = 0, mean = 0;
        for (std::size_t j = 0; j < p.size(); ++j) {
            for (int64_t x = 0; x < d; ++x) p[j] += scale * real(q[x]) * real(key(in, int64_t(j))[x]);
            largest = std::max(largest, p[j]);
        }
        for (double& x : p) sum += x = std::exp(x - largest);
        for (std::size_t j = 0; j < p.size(); ++j) {
            p[j] /= sum;
            for (int64_t x = 0; x < d; ++x) slope[j] += real(d_out[x]) * real(val(in, int64_t(j))[x]);
            mean += p[j] * slope[j];
        }
        for (std::size_t j = 0; j < p.size(); ++j) {
            const double s = scale * p[j] * (slope[j] - mean);
            for (int64_t x = 0; x < d; ++x) {
                out[5].at(m, row, h)[x] += p[j] * real(val(in, int64_t(j))[x]);
                out[0].at(m, row, h)[x] += s * real(key(in, int64_t(j))[x]);
                key(out, int64_t(j))[x] += s * real(q[x]);
                val(out, int64_t(j))[x] += p[j] * real(d_out[x]);
            }
        }
    }
};

template <class T>
bool all_same_bits(const std::vector<Tensor<T>>& a, const std::vector<Tensor<T>>& b) {
    for (std::size_t i = 0; i < a.size(); ++i) {
        if (!same_bits(a[i].memory, b[i].memory)) return false;
    }
    return true;
}

template <class T>
void compare(const std::string& variant, const Sizes& sizes, double size = 1) {
    const Problem<T> problem(sizes);
    const std::string name = variant + " " + std::to_string(sizeof(T)) + " bytes, d=" + std::to_string(sizes.d) +
                             " S=" + std::to_string(sizes.S) + " T=" + std::to_string(problem.tokens) +
                             (sizes.last_only ? " last" : "") + (sizes.causal ? " causal: " : ": ");
    const auto in = problem.random(size);
    const auto ours = problem.run(in, 1, variant);
    const auto truth = problem.naive(in);
    const char* const names[] = {"dq", "dk", "dv", "d_prefix_k", "d_prefix_v", "out"};
    const int64_t rows[] = {problem.queries, problem.tokens, problem.tokens, sizes.S, sizes.S, problem.queries};
    for (std::size_t t = 0; t < 6; ++t) {
        double apart = 0, most = 1;
        for (int64_t m = 0; m < sizes.M; ++m) {
            for (int64_t row = 0; row < rows[t]; ++row) {
                for (int64_t h = 0; h < sizes.H; ++h) {
                    for (int64_t x = 0; x < sizes.d; ++x) {
                        const double error = std::abs(real(ours[t].at(m, row, h)[x]) - truth[t].at(m, row, h)[x]);
                        apart = std::isfinite(error) ? std::max(apart, error) : INFINITY;
                        most = std::max(most, std::abs(truth[t].at(m, row, h)[x]));
                    }
                }
            }
        }
        const double arithmetic = sizeof(T) == 8 ? precision<double> : double(precision<float>);
        expect(apart < (precision<T> + 100 * size * size * arithmetic) * most, name + names[t]);
    }
    expect(all_same_bits(ours, problem.run(in, 2, variant)), name + "one thread and two differ");
    expect(all_same_bits(ours, problem.run(in, 5, variant)), name + "one thread and five differ");
}

template <class T>
void values(const std::string& variant) {
    for (int64_t d : {1, 3, 16, 33, 64, 80}) {
        for (int64_t S : {0, 1, 5}) {
            for (int kind = 0; kind < 4; ++kind) {
                compare<T>(variant, {1 + kind % 2, S, 3, d, kind % 3, {1, 7, 2, 20, 1, 3}, kind % 2 == 1, kind < 2});
            }
        }
    }
    compare<T>(variant, {1, 77, 1, 64, 0, {77, 1, 16, 17}, false, true});  // more queries than are held at once
    compare<T>(variant, {1, 3, 1, 128, 1, {77, 33}, false, false});
    compare<T>(variant, {2, 2, 2, 64, 0, std::vector<int64_t>(300, 2), false, true});  // many blocks, some threads
    compare<T>(variant, {1, 5, 2, 64, 0, {4, 9}, false, true}, 10);
}

void refuses(const std::string& expected, void (*spoil)(Problem<float>&)) {
    Problem<float> problem({1, 1, 1, 4, 0, {2, 3}, false, true});
    const auto in = problem.random(1);
    spoil(problem);
    expect_refusal(expected, [&] { problem.run(in, 1, ""); });
}

void errors() {
    refuses("offsets must ascend strictly from 0 to T: [0] must be 0, got 1", [](auto& p) { p.offsets[0] = 1; });
    refuses("[1] must be more than 0, got 0", [](auto& p) { p.offsets[1] = 0; });
    refuses("[1] must be at most T = 5, got 7", [](auto& p) { p.offsets[1] = 7; });
    refuses("[2] must be T = 5, got 4", [](auto& p) { p.offsets[2] = 4; });
    refuses("Tq must be T or C, that is 5 or 2, got 3", [](auto& p) { p.queries = 3; });
}

}  // namespace

int main() {
    errors();
    test_each_variant([](const std::string& variant) {
        values<float>(variant);
        values<double>(variant);
        values<BFloat16>(variant);
    });
    return finish("prefix_attention_test");
}
