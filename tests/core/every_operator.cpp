// Runs every CPU kernel at small odd shapes, for the sanitizers: each instruction set, dtype and mask, shared and
// separate matrices, matrix capsules. Each runs with one thread and with three, which must give the same bits, and is
// interrupted now and then. Outputs have exactly their size in memory and are filled with NaN first, so that an overrun
// or a missing write is seen.
//
// With CAPSOPS_EMULATION it also runs every CUDA kernel on the host (csrc/cuda/engine/emulation.h): twice, in a
// workspace of exactly the size that the kernel asks for, filled with NaN. The two results must have the same bits and
// agree with the CPU within rounding. It also checks the workspace sizes for the shapes of real networks, without
// running them.
//
// tests/core/sanitize.sh builds and runs this program; its argument `emulated` adds the CUDA kernels.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "../../csrc/operators.h"
#include "../../csrc/sizes.h"
#ifdef CAPSOPS_EMULATION
#include "../../csrc/cuda/engine/limits.h"
#endif

using namespace capsops;

namespace {

// The compiler's own half precision, to compare that of csrc/dtypes.h with.
#if defined(__aarch64__)
using Half = __fp16;  // GCC 12 has no _Float16 here
#else
using Half = _Float16;
#endif

uint64_t state = 1;

double uniform() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<double>(state >> 11) * 0x1p-53;
}

size_t bytes_of(Dtype dtype) {
    return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

Dtype accumulation(Dtype dtype) {
    return dtype == Dtype::float64 ? dtype : Dtype::float32;
}

// Numbers of one dtype, aligned to a cache line, with nothing allocated behind them.
class Numbers {
  public:
    Numbers(int64_t count, Dtype dtype)
        : count_(count), dtype_(dtype), data_(::operator new(bytes(), std::align_val_t{64})) {
        for (int64_t x = 0; x < count; ++x) set(x, NAN);
    }
    ~Numbers() { ::operator delete(data_, std::align_val_t{64}); }
    Numbers(const Numbers&) = delete;

    Numbers& random(double low = -1, double high = 1) {
        for (int64_t x = 0; x < count_; ++x) set(x, low + (high - low) * uniform());
        return *this;
    }
    void* get() { return data_; }
    const void* get() const { return data_; }
    size_t bytes() const { return static_cast<size_t>(count_) * bytes_of(dtype_); }

    // Whether this equals x within rounding; digits: how much of it counts as rounding, 1 for most operators.
    bool close_to(const Numbers& x, double digits) const {
        double largest = 0, error = 0;
        for (int64_t n = 0; n < count_; ++n) {
            largest = std::max(largest, std::fabs(x.at(n)));
            error = std::max(error, std::fabs(at(n) - x.at(n)));
        }
        const double digit = dtype_ == Dtype::float64    ? 1e-11
                             : dtype_ == Dtype::float32  ? 1e-4
                             : dtype_ == Dtype::bfloat16 ? 0x1p-6
                                                         : 0x1p-8;
        return error <= digits * digit * largest + 1e-20;
    }

    bool written() const {
        for (int64_t x = 0; x < count_; ++x)
            if (!std::isfinite(at(x))) return false;
        return true;
    }

  private:
    void set(int64_t x, double value) {
        const float narrow = static_cast<float>(value);
        uint32_t bits;
        std::memcpy(&bits, &narrow, 4);
        switch (dtype_) {
            case Dtype::float32: static_cast<float*>(data_)[x] = narrow; break;
            case Dtype::float64: static_cast<double*>(data_)[x] = value; break;
            case Dtype::bfloat16: static_cast<uint16_t*>(data_)[x] = static_cast<uint16_t>(bits >> 16); break;
            case Dtype::float16: {
                const Half half = static_cast<Half>(narrow);
                std::memcpy(static_cast<uint16_t*>(data_) + x, &half, 2);
            }
        }
    }
    double at(int64_t x) const {
        switch (dtype_) {
            case Dtype::float32: return static_cast<const float*>(data_)[x];
            case Dtype::float64: return static_cast<const double*>(data_)[x];
            case Dtype::bfloat16: {
                const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(data_)[x]) << 16;
                float wide;
                std::memcpy(&wide, &bits, 4);
                return wide;
            }
            case Dtype::float16: {
                Half half;
                std::memcpy(&half, static_cast<const uint16_t*>(data_) + x, 2);
                return static_cast<double>(half);
            }
        }
        return NAN;
    }

    int64_t count_;
    Dtype dtype_;
    void* data_;
};

int calls = 0;

#ifdef CAPSOPS_EMULATION
// The results of the CPU by name, in the order of the calls.
std::map<std::string, std::vector<std::vector<std::unique_ptr<Numbers>>>> results;
std::map<std::string, size_t> compared;
int64_t needed = 0;
void* workspace = nullptr;
bool measures = false;
#endif
bool emulated = false;

// ExecutionContext::stop returns true at this poll; 0: never.
int asks = 0;
bool stop() {
    return --asks == 0;
}

ExecutionContext context(int threads) {
    ExecutionContext p(threads);
    if (asks > 0) p.stop = &stop;
#ifdef CAPSOPS_EMULATION
    if (emulated) (measures ? void(p.needed = &needed) : void(p.workspace = workspace));
#endif
    return p;
}

using Outputs = const std::vector<std::unique_ptr<Numbers>>&;

[[noreturn]] void fail(const std::string& name, size_t output, const char* what) {
    std::printf("%s: output %zu: %s\n", name.c_str(), output, what);
    std::exit(1);
}

// Calls run(threads, outputs) with one thread and with three, each time with fresh outputs of the given sizes. digits:
// of close_to().
template <class Run>
void check(const std::string& name, const std::vector<std::pair<int64_t, Dtype>>& sizes, Run run,
           [[maybe_unused]] double digits = 1) {
    // Every third operator is interrupted, at its first poll or a later one if it polls that often. This comes before
    // the other runs, because some of them keep results for a gradient.
    if (!emulated && calls / 2 % 3 == 0) {
        std::vector<std::unique_ptr<Numbers>> outputs;
        for (const auto& [count, dtype] : sizes) outputs.push_back(std::make_unique<Numbers>(count, dtype));
        const int wanted = 1 + calls / 6 % 3;
        asks = wanted;
        const Status status = run(3, outputs);
        if (status != Status::interrupted && (wanted == 1 || status != Status::ok)) fail(name, 0, "not interrupted");
        asks = 0;
    }
    std::vector<std::unique_ptr<Numbers>> first;
    for (int threads : {1, 3}) {
        std::vector<std::unique_ptr<Numbers>> outputs;
        for (const auto& [count, dtype] : sizes) outputs.push_back(std::make_unique<Numbers>(count, dtype));
#ifdef CAPSOPS_EMULATION
        if (emulated) {
            measures = true;
            if (run(threads, outputs) != Status::ok) fail(name, 0, "does not say how much memory it needs");
            measures = false;
            workspace = ::operator new(static_cast<size_t>(needed), std::align_val_t{256});
            std::memset(workspace, 0xff, static_cast<size_t>(needed));
        }
#endif
        const Status status = run(threads, outputs);
#ifdef CAPSOPS_EMULATION
        if (emulated) ::operator delete(workspace, std::align_val_t{256});
#endif
        ++calls;
        if (status != Status::ok) fail(name, 0, "not ok");
        for (size_t m = 0; m < outputs.size(); ++m) {
            if (!outputs[m]->written()) fail(name, m, "not written, or not a number");
            if (threads > 1 && std::memcmp(outputs[m]->get(), first[m]->get(), first[m]->bytes()))
                fail(name, m, "not the same the second time");
        }
        if (threads == 1) first = std::move(outputs);
    }
#ifdef CAPSOPS_EMULATION
    if (!emulated) {
        results[name].push_back(std::move(first));
        return;
    }
    const auto& expected = results.at(name).at(compared[name]++);
    for (size_t m = 0; m < first.size(); ++m)
        if (!first[m]->close_to(*expected[m], digits)) fail(name, m, "not what the CPU computes");
#endif
}

struct Shape {
    int64_t B, N, K, J, D, rows;
};

std::string name_of(const Shape& s) {
    std::string name;
    for (const int64_t size : {s.B, s.N, s.K, s.J, s.D}) name += (name.empty() ? "" : "x") + std::to_string(size);
    return name;
}

// Windows on grids of one axis, which overlap by half. One place of seven is that of no capsule.
struct Grid {
    int64_t windows = 1, most = 3;
    std::vector<int64_t> places;  // [capsules, most]

    explicit Grid(const Shape& s) {
        for (const int64_t divisor : {2, 3, 5})
            if (s.B % divisor == 0 && s.B > 0) windows = divisor;
        const int64_t step = std::max<int64_t>(s.N / 2, 1), capsules = s.N > 0 ? (windows - 1) * step + s.N : 0;
        places.assign(static_cast<size_t>(capsules * most), -1);
        std::vector<int64_t> used(static_cast<size_t>(capsules));
        for (int64_t place = 0; place < windows * s.N; ++place) {
            if (place % 7 == 3) continue;
            const int64_t capsule = place / s.N * step + place % s.N;
            places[static_cast<size_t>(capsule * most + used[static_cast<size_t>(capsule)]++)] = place;
        }
    }
};

// Which input capsules are not masked.
enum class Mask { all, some, none };

// expanded: one matrix for all input and output capsules, by strides of 0. votes_given: votes in place of u and W.
void routings(const Kernels& k, const Shape& s, Dtype dtype, Mask there, bool shared, bool expanded,
              const std::string& name, bool votes_given = false) {
    const bool masked = there != Mask::all;
    state = std::hash<std::string>()(name);
    const Dtype wide = accumulation(dtype);
    const SquashKind squashes[] = {SquashKind::sabour, SquashKind::efficient, SquashKind::none};
    const SquashKind kind = squashes[std::hash<std::string>()(name) % 3];
    const int64_t H = s.rows * s.D, weights = votes_given ? 0 : (shared ? 1 : s.N) * s.K * s.J * s.D;
    const int64_t capsules = s.B * s.N * (votes_given ? s.J * H : s.rows * s.K), outputs = s.B * s.J * H;
    Numbers u(capsules, dtype), weight(expanded ? s.K * s.D : weights, dtype), mix(s.J * s.J, wide),
        mix_bias(s.J, wide), bias(s.J * H, wide);
    Numbers g(outputs, wide), prior(s.N * s.J, wide), g_votes(s.B * s.N * s.J * H, dtype);
    Numbers activation(s.B * s.N, wide), beta_u(s.J, wide), beta_a(s.J, wide), g_activation(s.B * s.J, wide);
    Numbers input_weight(s.B * s.N, wide);
    for (Numbers* x :
         {&u, &mix, &mix_bias, &bias, &g, &prior, &g_votes, &beta_u, &beta_a, &g_activation, &input_weight})
        x->random();
    // Keeps the votes from growing with K, and the softmax away from 0 and 1, where its gradient is rounding errors.
    const double largest = s.D > 1000 ? 0.05 : s.K > 16 ? 4 / std::sqrt(static_cast<double>(s.K)) : 1;
    weight.random(-largest, largest);
    activation.random(0.1, 0.9);
    std::vector<uint8_t> mask(static_cast<size_t>(s.B * s.N));
    for (size_t x = 0; x < mask.size() && there == Mask::some; ++x)
        mask[x] = x % 7 != 0 && x >= static_cast<size_t>(s.N) / 2;

    const auto operands = [&](int threads) {
        if (votes_given) {
            Capsules c{u.get(), nullptr,         masked ? mask.data() : nullptr, s.B, s.N, 1, s.J, H, 1, 0,
                       dtype,   context(threads)};
            return c.votes_given = true, c;
        }
        const int64_t stride = shared || expanded ? 0 : s.K * s.J * s.D;
        Capsules c{u.get(), weight.get(),    masked ? mask.data() : nullptr, s.B, s.N, s.K, s.J, s.D, s.rows, stride,
                   dtype,   context(threads)};
        if (expanded) c.strided = c.own_gradients = true, c.strides[0] = s.D, c.strides[2] = 1;
        return c;
    };
    if (!emulated || bytes_of(dtype) > 2 || s.rows > 1) {
        const std::vector<double> temperatures{0.01, 0.02, 0.03};
        Numbers em_state(3 * s.B * s.J * (3 * H + 2), wide);
        // The variances of a few input capsules may collapse, and then float32 keeps fewer digits.
        const double digits = dtype == Dtype::float64 ? 1 : 10;
        check(
            name + "em", {{outputs, wide}, {s.B * s.J, wide}, {3 * s.B * s.J * (3 * H + 2), wide}},
            [&](int threads, Outputs o) {
                const Status status = k.em_routing(operands(threads), activation.get(), beta_u.get(), beta_a.get(),
                                                   temperatures, o[0]->get(), o[1]->get(), o[2]->get());
                std::memcpy(em_state.get(), o[2]->get(), o[2]->bytes());
                return status;
            },
            digits);
        check(
            name + "em backward", {{capsules, dtype}, {weights, dtype}, {s.B * s.N, wide}, {s.J, wide}, {s.J, wide}},
            [&](int threads, Outputs o) {
                return k.em_routing_backward(operands(threads), activation.get(), beta_u.get(), temperatures,
                                             em_state.get(), g.get(), g_activation.get(), o[0]->get(), o[1]->get(),
                                             o[2]->get(), o[3]->get(), o[4]->get());
            },
            digits);
        if (!emulated || masked) {
            // Long votes of two input capsules have logits of thousands that hang on collapsed variances.
            const double joined_digits = s.D > 1000 && dtype == Dtype::float64 ? 1000 : digits;
            const Grid grid(s);
            const auto count = static_cast<int64_t>(grid.places.size()) / grid.most;
            check(
                name + "em over positions", {{outputs, wide}, {s.B * s.J, wide}, {3 * s.B * s.J * (3 * H + 2), wide}},
                [&](int threads, Outputs o) {
                    const Status status = k.em_routing_over_positions(
                        operands(threads), activation.get(), beta_u.get(), beta_a.get(), temperatures, grid.windows,
                        count, grid.most, grid.places.data(), o[0]->get(), o[1]->get(), o[2]->get());
                    std::memcpy(em_state.get(), o[2]->get(), o[2]->bytes());
                    return status;
                },
                joined_digits);
            check(
                name + "em over positions backward",
                {{capsules, dtype}, {weights, dtype}, {s.B / grid.windows * count, wide}, {s.J, wide}, {s.J, wide}},
                [&](int threads, Outputs o) {
                    return k.em_routing_over_positions_backward(
                        operands(threads), activation.get(), beta_u.get(), temperatures, grid.windows, count, grid.most,
                        em_state.get(), g.get(), g_activation.get(), grid.places.data(), o[0]->get(), o[1]->get(),
                        o[2]->get(), o[3]->get(), o[4]->get());
                },
                joined_digits);
        }
    }
    if (s.rows > 1) return;

    // One gradient alone. Of the CUDA kernels in float32 only, because fibers are slow, and for those of tensor cores.
    const bool in_tensor_cores = dtype == Dtype::bfloat16 && s.J == 2 && s.D == 16 && s.K % 8 == 0;
    const auto check_one = [&](const std::string& what, const std::vector<std::pair<int64_t, Dtype>>& sizes, auto run,
                               double digits = 1) {
        if (!emulated || dtype == Dtype::float32 || in_tensor_cores) check(what, sizes, run, digits);
    };
    Numbers saved(3 * outputs, wide);
    const auto save = [&](const std::unique_ptr<Numbers>& s_) { std::memcpy(saved.get(), s_->get(), s_->bytes()); };
    // layer_norm divides by a deviation of s that may be small, which enlarges its rounding errors.
    const double normed_digits = dtype == Dtype::float64 ? 1 : 20;
    for (const bool weighed : {false, true}) {
        const std::string own = name + (weighed ? "weighed attention" : "attention");
        const void* const w = weighed ? input_weight.get() : nullptr;
        check(own, {{outputs, wide}, {outputs, wide}}, [&](int threads, Outputs o) {
            const Status status = k.attention_routing(operands(threads), mix.get(), mix_bias.get(), w,
                                                      SquashKind::layer_norm, o[0]->get(), o[1]->get());
            return save(o[1]), status;
        });
        std::vector<std::pair<int64_t, Dtype>> gradients{
            {capsules, dtype}, {weights, dtype}, {s.J * s.J, wide}, {s.J, wide}};
        if (weighed) gradients.push_back({s.B * s.N, wide});
        check(
            own + " backward", gradients,
            [&](int threads, Outputs o) {
                return k.attention_routing_backward(
                    operands(threads), mix.get(), mix_bias.get(), w, SquashKind::layer_norm, saved.get(), g.get(),
                    o[0]->get(), o[1]->get(), o[2]->get(), o[3]->get(), weighed ? o[4]->get() : nullptr);
            },
            normed_digits);
    }
    // Of the weighed sum that was saved last.
    check_one(
        name + "attention backward, bias", {{s.J, wide}},
        [&](int threads, Outputs o) {
            return k.attention_routing_backward(operands(threads), mix.get(), nullptr, nullptr, SquashKind::layer_norm,
                                                saved.get(), g.get(), nullptr, nullptr, nullptr, o[0]->get(), nullptr);
        },
        normed_digits);
    check_one(
        name + "weighed attention backward, input weight", {{s.B * s.N, wide}},
        [&](int threads, Outputs o) {
            return k.attention_routing_backward(operands(threads), mix.get(), mix_bias.get(), input_weight.get(),
                                                SquashKind::layer_norm, saved.get(), g.get(), nullptr, nullptr, nullptr,
                                                nullptr, o[0]->get());
        },
        normed_digits);
    for (const bool leaky : {false, true}) {
        check(name + "dynamic", {{outputs, wide}, {3 * outputs, wide}}, [&](int threads, Outputs o) {
            const Status status =
                k.dynamic_routing(operands(threads), bias.get(), 3, leaky, kind, o[0]->get(), o[1]->get());
            return save(o[1]), status;
        });
        for (const bool detach : {false, true})
            check(name + "dynamic backward", {{capsules, dtype}, {weights, dtype}, {s.J * H, wide}},
                  [&](int threads, Outputs o) {
                      return k.dynamic_routing_backward(operands(threads), 3, leaky, detach, kind, saved.get(), g.get(),
                                                        o[0]->get(), o[1]->get(), o[2]->get());
                  });
    }
    check_one(name + "dynamic backward, u", {{capsules, dtype}}, [&](int threads, Outputs o) {
        return k.dynamic_routing_backward(operands(threads), 3, true, false, kind, saved.get(), g.get(), o[0]->get(),
                                          nullptr, nullptr);
    });
    check_one(name + "dynamic backward, W", {{weights, dtype}}, [&](int threads, Outputs o) {
        return k.dynamic_routing_backward(operands(threads), 3, true, false, kind, saved.get(), g.get(), nullptr,
                                          o[0]->get(), nullptr);
    });
    check(name + "step", {{outputs, wide}},
          [&](int threads, Outputs o) { return k.routing_step(operands(threads), saved.get(), o[0]->get()); });
    check(name + "step backward", {{capsules, dtype}, {weights, dtype}, {outputs, wide}}, [&](int threads, Outputs o) {
        return k.routing_step_backward(operands(threads), saved.get(), g.get(), o[0]->get(), o[1]->get(), o[2]->get());
    });
    check_one(name + "step backward, state", {{outputs, wide}}, [&](int threads, Outputs o) {
        return k.routing_step_backward(operands(threads), saved.get(), g.get(), nullptr, nullptr, o[0]->get());
    });
    {
        Numbers logits(s.B * s.N * s.J, wide);
        logits.random();
        const int64_t inputs = s.B * s.N;
        check(name + "step with logits", {{outputs, wide}}, [&](int threads, Outputs o) {
            return k.routing_step_with_logits(operands(threads), saved.get(), logits.get(), input_weight.get(),
                                              o[0]->get());
        });
        check(name + "step with logits backward",
              {{capsules, dtype}, {weights, dtype}, {outputs, wide}, {inputs * s.J, wide}, {inputs, wide}},
              [&](int threads, Outputs o) {
                  return k.routing_step_with_logits_backward(operands(threads), saved.get(), logits.get(),
                                                             input_weight.get(), g.get(), o[0]->get(), o[1]->get(),
                                                             o[2]->get(), o[3]->get(), o[4]->get());
              });
        check(name + "step with logits backward, logits", {{s.B * s.N * s.J, wide}}, [&](int threads, Outputs o) {
            return k.routing_step_with_logits_backward(operands(threads), saved.get(), logits.get(), nullptr, g.get(),
                                                       nullptr, nullptr, nullptr, o[0]->get(), nullptr);
        });
        check(name + "dynamic with logits", {{outputs, wide}, {3 * outputs, wide}}, [&](int threads, Outputs o) {
            const Status status = k.dynamic_routing_with_logits(operands(threads), logits.get(), input_weight.get(),
                                                                bias.get(), 3, true, kind, o[0]->get(), o[1]->get());
            return save(o[1]), status;
        });
        for (const bool detach : {false, true})
            check(name + "dynamic with logits backward",
                  {{capsules, dtype}, {weights, dtype}, {inputs * s.J, wide}, {inputs, wide}, {s.J * H, wide}},
                  [&](int threads, Outputs o) {
                      return k.dynamic_routing_with_logits_backward(
                          operands(threads), logits.get(), input_weight.get(), 3, true, detach, kind, saved.get(),
                          g.get(), o[0]->get(), o[1]->get(), o[2]->get(), o[3]->get(), o[4]->get());
                  });
        Numbers log_sums(3 * s.B * s.J, wide);
        const auto save_both = [&](Outputs o) {
            save(o[1]);
            std::memcpy(log_sums.get(), o[2]->get(), o[2]->bytes());
        };
        for (const bool given : {false, true}) {
            const void *initial = given ? logits.get() : nullptr, *weighed = given ? input_weight.get() : nullptr;
            check(name + "dynamic over inputs", {{outputs, wide}, {3 * outputs, wide}, {3 * s.B * s.J, wide}},
                  [&](int threads, Outputs o) {
                      const Status status =
                          k.dynamic_routing_over_inputs(operands(threads), initial, weighed, bias.get(), 3, kind,
                                                        o[0]->get(), o[1]->get(), o[2]->get());
                      return save_both(o), status;
                  });
            check(name + "dynamic over inputs backward",
                  {{capsules, dtype}, {weights, dtype}, {inputs * s.J, wide}, {inputs, wide}, {s.J * H, wide}},
                  [&](int threads, Outputs o) {
                      return k.dynamic_routing_over_inputs_backward(
                          operands(threads), initial, weighed, bias.get(), 3, !given, kind, saved.get(), log_sums.get(),
                          g.get(), o[0]->get(), o[1]->get(), o[2]->get(), o[3]->get(), o[4]->get());
                  });
        }
        check(name + "step over inputs", {{outputs, wide}, {outputs, wide}, {s.B * s.J, wide}},
              [&](int threads, Outputs o) {
                  const Status status =
                      k.routing_step_over_inputs(operands(threads), g.get(), logits.get(), input_weight.get(),
                                                 o[0]->get(), o[1]->get(), o[2]->get());
                  return save_both(o), status;
              });
        check(name + "step over inputs backward",
              {{capsules, dtype}, {weights, dtype}, {outputs, wide}, {inputs * s.J, wide}, {inputs, wide}},
              [&](int threads, Outputs o) {
                  return k.routing_step_over_inputs_backward(
                      operands(threads), g.get(), logits.get(), input_weight.get(), saved.get(), log_sums.get(),
                      g.get(), o[0]->get(), o[1]->get(), o[2]->get(), o[3]->get(), o[4]->get());
              });
    }
    Numbers total(outputs, wide);
    for (const bool weighed : {false, true}) {
        const std::string own = name + (weighed ? "weighed self-attention" : "self-attention");
        const void* const w = weighed ? input_weight.get() : nullptr;
        check(own, {{outputs, wide}, {outputs, wide}, {outputs, wide}}, [&](int threads, Outputs o) {
            const Status status =
                k.self_attention_routing(operands(threads), prior.get(), w, 0.5, o[0]->get(), o[1]->get(), o[2]->get());
            std::memcpy(total.get(), o[1]->get(), o[1]->bytes());
            return save(o[2]), status;
        });
        std::vector<std::pair<int64_t, Dtype>> gradients{{capsules, dtype}, {weights, dtype}, {s.N * s.J, wide}};
        if (weighed) gradients.push_back({s.B * s.N, wide});
        check(own + " backward", gradients, [&](int threads, Outputs o) {
            return k.self_attention_routing_backward(operands(threads), prior.get(), w, 0.5, total.get(), saved.get(),
                                                     g.get(), o[0]->get(), o[1]->get(), o[2]->get(),
                                                     weighed ? o[3]->get() : nullptr);
        });
        check_one(own + " backward, prior", {{s.N * s.J, wide}}, [&](int threads, Outputs o) {
            return k.self_attention_routing_backward(operands(threads), nullptr, w, 0.5, total.get(), saved.get(),
                                                     g.get(), nullptr, nullptr, o[0]->get(), nullptr);
        });
    }
    check_one(name + "weighed self-attention backward, input weight", {{s.B * s.N, wide}}, [&](int threads, Outputs o) {
        return k.self_attention_routing_backward(operands(threads), nullptr, input_weight.get(), 0.5, total.get(),
                                                 saved.get(), g.get(), nullptr, nullptr, nullptr, o[0]->get());
    });
    if (masked || votes_given) return;
    check(name + "votes", {{s.B * s.N * s.J * H, dtype}},
          [&](int threads, Outputs o) { return k.affine_votes(operands(threads), o[0]->get()); });
    check(name + "votes backward", {{capsules, dtype}, {weights, dtype}}, [&](int threads, Outputs o) {
        return k.affine_votes_backward(operands(threads), g_votes.get(), o[0]->get(), o[1]->get());
    });
}

// Votes that are the same for all output capsules.
void one_vote(const Kernels& k, const Shape& s, Dtype dtype, bool masked, const std::string& name) {
    state = std::hash<std::string>()(name);
    const Dtype wide = accumulation(dtype);
    const int64_t inputs = s.B * s.N, outputs = s.B * s.J * s.D;
    Numbers u(inputs * s.D, dtype), logits(inputs * s.J, wide), V(outputs, wide), g(outputs, wide);
    for (Numbers* x : {&u, &logits, &V, &g}) x->random();
    std::vector<uint8_t> mask(static_cast<size_t>(inputs));
    for (size_t x = 0; x < mask.size(); ++x) mask[x] = x % 7 != 0;
    const auto operands = [&](int threads) {
        Capsules c{u.get(), nullptr,         masked ? mask.data() : nullptr, s.B, s.N, 1, s.J, s.D, 1, 0,
                   dtype,   context(threads)};
        return c.votes_given = c.one_vote = true, c;
    };
    check(name + "step", {{outputs, wide}},
          [&](int threads, Outputs o) { return k.routing_step(operands(threads), V.get(), o[0]->get()); });
    check(name + "step backward", {{inputs * s.D, dtype}, {outputs, wide}}, [&](int threads, Outputs o) {
        return k.routing_step_backward(operands(threads), V.get(), g.get(), o[0]->get(), nullptr, o[1]->get());
    });
    Numbers saved(3 * outputs, wide), log_sums(3 * s.B * s.J, wide);
    check(name + "dynamic", {{outputs, wide}, {3 * outputs, wide}}, [&](int threads, Outputs o) {
        const Status status =
            k.dynamic_routing(operands(threads), nullptr, 3, false, SquashKind::sabour, o[0]->get(), o[1]->get());
        std::memcpy(saved.get(), o[1]->get(), o[1]->bytes());
        return status;
    });
    check(name + "dynamic backward", {{inputs * s.D, dtype}}, [&](int threads, Outputs o) {
        return k.dynamic_routing_backward(operands(threads), 3, false, false, SquashKind::sabour, saved.get(), g.get(),
                                          o[0]->get(), nullptr, nullptr);
    });
    check(name + "dynamic over inputs", {{outputs, wide}, {3 * outputs, wide}, {3 * s.B * s.J, wide}},
          [&](int threads, Outputs o) {
              const Status status =
                  k.dynamic_routing_over_inputs(operands(threads), logits.get(), nullptr, nullptr, 3, SquashKind::none,
                                                o[0]->get(), o[1]->get(), o[2]->get());
              std::memcpy(saved.get(), o[1]->get(), o[1]->bytes());
              std::memcpy(log_sums.get(), o[2]->get(), o[2]->bytes());
              return status;
          });
    check(name + "dynamic over inputs backward", {{inputs * s.D, dtype}, {inputs * s.J, wide}},
          [&](int threads, Outputs o) {
              return k.dynamic_routing_over_inputs_backward(operands(threads), logits.get(), nullptr, nullptr, 3, false,
                                                            SquashKind::none, saved.get(), log_sums.get(), g.get(),
                                                            o[0]->get(), nullptr, o[1]->get(), nullptr, nullptr);
          });
}

void layers(const Kernels& k, Dtype dtype, const std::string& name) {
    constexpr int64_t rows = 2051, dim = 5, B = 2, types = 3, K = 5, pixels = 77;
    state = std::hash<std::string>()(name);
    for (const SquashKind kind : {SquashKind::sabour, SquashKind::efficient}) {
        Numbers s(rows * dim, dtype), g(rows * dim, dtype);
        s.random(), g.random();
        check(name + "squash", {{rows * dim, dtype}}, [&](int threads, Outputs o) {
            return k.squash(context(threads), s.get(), o[0]->get(), rows, dim, kind, dtype);
        });
        check(name + "squash backward", {{rows * dim, dtype}}, [&](int threads, Outputs o) {
            return k.squash_backward(context(threads), g.get(), s.get(), o[0]->get(), rows, dim, kind, dtype);
        });
        const int64_t size = B * types * K * pixels;
        Numbers features(size, dtype), g_u(size, dtype);
        features.random(), g_u.random();
        for (const bool channels_last : {false, true}) {
            const int64_t channel = channels_last ? 1 : pixels, pixel = channels_last ? types * K : 1;
            const auto p = [&](int threads) {
                return PrimaryCapsules{B,     types,   pixels, K,     types * K * pixels, K * channel,
                                       pixel, channel, kind,   dtype, context(threads)};
            };
            check(name + "primary capsules", {{size, dtype}},
                  [&](int threads, Outputs o) { return k.primary_capsules(p(threads), features.get(), o[0]->get()); });
            check(name + "primary capsules backward", {{size, dtype}}, [&](int threads, Outputs o) {
                return k.primary_capsules_backward(p(threads), g_u.get(), features.get(), o[0]->get());
            });
        }
    }
}

#ifdef CAPSOPS_EMULATION
// Checks that the workspace of every operator is within the bound of csrc/cuda/engine/limits.h.
void workspaces() {
    struct Case {
        Shape shape;
        bool shared, staged;
    };
    const Case cases[] = {
        {{8, 460'800, 8, 2, 16, 1}, false, false},   // CardioCaps
        {{128, 1152, 8, 10, 16, 1}, false, false},   // MNIST
        {{1024, 1152, 8, 10, 16, 1}, false, false},  // MNIST, a large batch
        {{256, 50, 64, 4, 64, 1}, true, false},      // a recommender
        {{4096, 50, 64, 4, 64, 1}, true, false},     // a recommender, a large batch
        {{256, 16, 8, 10, 16, 1}, false, false},     // Efficient-CapsNet
        {{4, 64, 8, 64, 8, 1}, false, true},         // as many output as input capsules
        {{4, 512, 8, 512, 8, 1}, false, true},
        {{4, 2048, 8, 2048, 8, 1}, false, true},
        {{4096, 1152, 512, 10, 16, 1}, false, true},  // matrices with many rows
        {{64, 100'000, 1000, 3, 7, 1}, true, true},
        {{64, 10'000, 16, 1000, 33, 1}, true, true},
        {{1, 1'000'000'000, 16, 2, 16, 1}, true, false},
    };
    cuda::limits = {};
    measures = emulated = true;
    const Kernels& k = cuda::kernels;
    void* const p = reinterpret_cast<void*>(1 << 20);  // any non-null address; nothing is read or written
    int sizes = 0;
    for (const Case& x : cases)
        for (const Dtype dtype : {Dtype::float32, Dtype::float64, Dtype::bfloat16})
            for (const bool gradient_of_weight : {false, true}) {
                const Shape& s = x.shape;
                const int64_t a = static_cast<int64_t>(bytes_of(accumulation(dtype)));
                const int64_t state = a * s.B * s.J * s.D;
                const Capsules c{p,     p,         nullptr, s.B, s.N, s.K, s.J, s.D, 1, x.shared ? 0 : s.K * s.J * s.D,
                                 dtype, context(1)};
                void* const g_weight = gradient_of_weight ? p : nullptr;
                const SquashKind kind = SquashKind::sabour;
                const auto ask = [&](const char* op, bool params, Status status, int64_t more = 0) {
                    int64_t most = 32'000'000 + 16 * state + more;
                    if (x.staged) most += 2 * a * s.B * s.K;
                    if (x.staged && params) most += 3 * a * s.J * (s.J + 1);
                    if (x.staged && x.shared) most += 3 * a * s.K * s.J * s.D;
                    ++sizes;
                    if (status == Status::ok && needed <= most) return;
                    std::printf("%s, %s, dtype %d: a workspace of %lld bytes; expected at most %lld\n",
                                name_of(s).c_str(), op, static_cast<int>(dtype), static_cast<long long>(needed),
                                static_cast<long long>(most));
                    std::exit(1);
                };
                for (void* const w : {static_cast<void*>(nullptr), p}) {
                    ask("attention", false, k.attention_routing(c, p, p, w, kind, p, p));
                    ask("attention backward", true,
                        k.attention_routing_backward(c, p, p, w, kind, p, p, p, g_weight, p, p, w));
                    ask("self-attention", false, k.self_attention_routing(c, p, w, 1, p, p, p));
                    ask("self-attention backward", false,
                        k.self_attention_routing_backward(c, p, w, 1, p, p, p, p, g_weight, p, w));
                }
                for (const int iterations : {1, 3, 10, 100, 10'000}) {
                    ask("dynamic", false, k.dynamic_routing(c, p, iterations, false, kind, p, p));
                    for (const bool detach : {false, true})
                        ask("dynamic backward", false,
                            k.dynamic_routing_backward(c, iterations, false, detach, kind, p, p, p, g_weight, p));
                }
                ask("step", false, k.routing_step(c, p, p));
                ask("step backward", false, k.routing_step_backward(c, p, p, p, g_weight, p));
                const std::vector<double> temperatures(3, 0.01);
                // The threads of EM routing have 8 components of a vote, and powers of 2 of them.
                const int64_t padded = a * s.B * power_of_two(s.J) * power_of_two((s.D + 7) / 8) * 8;
                const int64_t em = 40 * padded + (x.staged ? 0 : 2 * a * s.B * (s.K + s.J * s.D));
                ask("em", false, k.em_routing(c, p, p, p, temperatures, p, p, p), em);
                ask("em backward", false, k.em_routing_backward(c, p, p, temperatures, p, p, p, p, g_weight, p, p, p),
                    em);
                // An activation for each pair, and two numbers, those of the pass and of each iteration.
                const int64_t pairs = a * s.B * s.N;
                ask("em over positions", false,
                    k.em_routing_over_positions(c, p, p, p, temperatures, 1, s.N, 2, p, p, p, p), em + 5 * pairs);
                ask("em over positions backward", false,
                    k.em_routing_over_positions_backward(c, p, p, temperatures, 1, s.N, 2, p, p, p, p, p, g_weight, p,
                                                         p, p),
                    em + 9 * pairs);
                ask("votes", false, k.affine_votes(c, p));
                ask("votes backward", false, k.affine_votes_backward(c, p, p, g_weight));
            }
    std::printf("%d workspaces: none is larger than csrc/cuda/engine/limits.h says\n", sizes);
}
#endif

}  // namespace

int main() {
    const Shape shapes[] = {{1, 1, 1, 1, 1, 1},   {3, 211, 8, 2, 16, 1}, {2, 19, 9, 17, 3, 1},  {33, 5, 16, 10, 16, 1},
                            {5, 40, 7, 3, 33, 1}, {3, 21, 4, 3, 4, 4},   {11, 20, 9, 2, 16, 1}, {15, 4, 11, 2, 30, 1},
                            {16, 9, 4, 3, 4, 4},  {45, 70, 3, 5, 3, 1},  {150, 3, 5, 10, 4, 1}, {70, 2, 3, 6, 20, 1}};
    // Shapes that tensor cores take in bfloat16.
    const Shape tensor_cores[] = {{1, 45, 8, 2, 16, 1},
                                  {5, 61, 16, 2, 16, 1},
                                  {8, 33, 8, 2, 16, 1},
                                  {9, 59, 8, 2, 16, 1},
                                  {16, 23, 16, 2, 16, 1}};
    // Shapes of which one batch item is too large for a block of GPU threads or for its shared memory: many output
    // capsules; also many batch items; long votes; both; matrices with many rows, if gradients are wanted; a
    // convolution with many parameters, if their gradients are wanted; many output capsules that are read by 16 bytes,
    // short and long ones.
    const Shape large[] = {{2, 5, 3, 300, 3, 1}, {18, 3, 2, 260, 1, 1}, {2, 2, 2, 3, 1361, 1}, {2, 2, 2, 86, 33, 1},
                           {2, 5, 400, 3, 3, 1}, {2, 5, 4, 100, 3, 1},  {2, 7, 8, 280, 8, 1},  {6, 5, 9, 136, 16, 1}};
    // Shapes with a size of 0, also with the large sizes above. J is never 0: operators refuse it, and its softmax is
    // not defined.
    const Shape empty[] = {{0, 5, 3, 2, 4, 1},   {2, 0, 3, 2, 4, 1},   {0, 0, 3, 3, 4, 1},   {2, 5, 0, 3, 4, 1},
                           {2, 5, 3, 2, 0, 1},   {0, 5, 4, 100, 3, 1}, {2, 0, 4, 100, 3, 1}, {0, 2, 2, 3, 1361, 1},
                           {0, 5, 400, 3, 3, 1}, {2, 3, 0, 260, 1, 1}, {0, 5, 2, 3, 4, 3},   {2, 0, 2, 3, 4, 3}};
    const auto run_all = [&](const Kernels& kernels, const std::string& name) {
        for (const Dtype dtype : {Dtype::float32, Dtype::float64, Dtype::bfloat16, Dtype::float16}) {
            const std::string prefix = name + std::to_string(static_cast<int>(dtype)) + " ";
            layers(kernels, dtype, prefix);
            const auto run = [&](const Shape& s, Mask mask, bool shared, bool expanded = false) {
#ifdef CAPSOPS_EMULATION
                // Without a mask there is memory for more partial sums, so that a gradient splits the batch.
                cuda::limits.sums = mask == Mask::all ? 1 << 20 : 8 << 10;
#endif
                routings(kernels, s, dtype, mask, shared, expanded,
                         prefix + name_of(s) +
                             (mask == Mask::all    ? ""
                              : mask == Mask::some ? " masked"
                                                   : " all masked") +
                             (shared     ? " shared "
                              : expanded ? " expanded "
                                         : " "));
            };
            for (const Shape& s : empty)
                for (const bool shared : {false, true}) run(s, Mask::all, shared);
            // Fibers are slow, so half precision runs fewer shapes: it differs only in how numbers are read and
            // written.
            const bool half = bytes_of(dtype) == 2;
            for (const Shape& s : shapes)
                for (const Mask mask : {Mask::all, Mask::some})
                    for (const bool shared : {false, true})
                        if (!emulated || !half || (mask == Mask::some && !shared)) run(s, mask, shared);
            for (const Shape& s : tensor_cores)
                for (const Mask mask : {Mask::all, Mask::some})
                    if (dtype == Dtype::bfloat16) run(s, mask, false);
            for (const Shape& s : {shapes[2], large[5]}) run(s, Mask::none, half);
            for (const Shape& s : shapes)
                if (!emulated && dtype != Dtype::float64)
                    run(s, dtype == Dtype::float32 ? Mask::all : Mask::some, false, true);
            const auto given = [&](const Shape& s, bool masked) {
                const std::string own = prefix + name_of(s) + (masked ? " masked" : "");
                routings(kernels, s, dtype, masked ? Mask::some : Mask::all, false, false, own + " given votes ", true);
                one_vote(kernels, s, dtype, masked, own + " one vote ");
            };
            for (const Shape& s : {shapes[0], shapes[2], shapes[4], shapes[5], empty[0], empty[1]})
                for (const bool masked : {false, true})
                    if (!emulated || !half || masked) given(s, masked);
            // A batch that is split, and votes that are too large for a block.
            if (dtype == Dtype::float32) {
                given(shapes[9], false), given(empty[5], false);
                for (const Shape& s : {large[0], large[7]}) given(s, true);
                // Many batch items, which the CPU takes in blocks.
                if (!emulated) given({35, 23, 16, 2, 16, 1}, true);
            }
            for (const Shape& s : large) {
                if (!half) run(s, Mask::all, false);
                run(s, Mask::some, dtype != Dtype::bfloat16);
            }
        }
    };
    std::string sets = cpu::instruction_sets();
    for (size_t begin = 0; begin < sets.size();) {
        const size_t end = std::min(sets.find(' ', begin), sets.size());
        const std::string set = sets.substr(begin, end - begin);
        begin = end + 1;
        if (!cpu::use_instruction_set(set.c_str())) return 1;
#ifdef CAPSOPS_EMULATION
        run_all(cpu::kernels(), "");
#else
        run_all(cpu::kernels(), set + " ");
#endif
    }
#ifdef CAPSOPS_EMULATION
    emulated = true;
    run_all(cuda::kernels, "");
    workspaces();
#endif
    std::printf("%d calls: all written, and the same with one thread and with three\n", calls);
}
