// capsops._C: pointers and sizes in, a status out, the GIL released while a kernel runs. Shapes, dtypes and contiguity
// have been checked in Python before a pointer gets here; sizes that no tensor has are answered with a status.

#include <chrono>
#include <cstdint>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "checks.h"
#include "operators.h"

namespace py = pybind11;
using namespace capsops;

namespace {

// A tensor's data_ptr(); 0 for one that is not there.
using Address = uintptr_t;

template <class T = void> T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// A place on a GPU where nothing runs; the bytes of workspace that an operator would take are counted.
struct Counting : Place {
    int64_t bytes = 0;
    explicit Counting(int index) : Place(1) { device = index, needed = &bytes; }
    Counting(const Counting&) = delete;
};

#ifdef CAPSOPS_CUDA_ARCHS
const Kernels& gpu_kernels() {
    return cuda::kernels;
}
#else
// Python does not ask for a GPU then.
const Kernels& gpu_kernels() {
    throw py::value_error("capsops was built without CUDA kernels");
}
#endif

const Kernels& kernels(const Place& place) {
    return place.device < 0 ? cpu::kernels() : gpu_kernels();
}

const Kernels& kernels(const Place& place, const Capsules& c) {
    return place.device < 0 ? cpu::kernels(c) : gpu_kernels();
}

// The same capsules at a place.
template <class Operands> Operands on(const Place& place, Operands operands) {
    operands.place = place;
    return operands;
}

// When the kernel that runs in this thread should next see whether a signal has arrived.
using Clock = std::chrono::steady_clock;
constexpr auto between_signals = std::chrono::milliseconds(200);
thread_local Clock::time_point next_look;

// A signal handler of C sets a flag alone; Python's own handlers run when Python's main thread next runs Python, which
// is after the kernel. So a kernel in that thread lets them run. Returns whether one raised an exception, as that of
// Ctrl-C does.
bool signal_raised() {
    const Clock::time_point now = Clock::now();
    if (now < next_look) return false;
    const PyGILState_STATE gil = PyGILState_Ensure();
    const bool raised = PyErr_CheckSignals() != 0;
    PyGILState_Release(gil);
    next_look = Clock::now() + between_signals;
    return raised;
}

// Calls a kernel, if what it is given is valid, without the GIL.
template <class Call> Status run(const Place& place, bool operands_are_valid, Call call) {
    if (!operands_are_valid || !valid(place)) return Status::invalid_argument;
    Status status;
    {
        const py::gil_scoped_release release;
        if (place.stop) next_look = Clock::now() + between_signals;
        status = call();
    }
    // The exception of the signal handler.
    if (status == Status::interrupted) throw py::error_already_set();
    return status;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled capsule-routing kernels. Use the functions of capsops, not these.";
#ifdef CAPSOPS_CUDA_ARCHS
    m.attr("cuda_architectures") = CAPSOPS_CUDA_ARCHS;
    m.attr("cuda_runtime") = cuda::runtime_version();
    m.def("cuda_driver", &cuda::driver_version);
    m.def("cuda_error", &cuda::error);
#else
    m.attr("cuda_architectures") = py::none();
#endif
    m.attr("compiler") = CAPSOPS_COMPILER;

    py::enum_<Dtype>(m, "Dtype")
        .value("float32", Dtype::float32)
        .value("float64", Dtype::float64)
        .value("bfloat16", Dtype::bfloat16)
        .value("float16", Dtype::float16);
    py::enum_<Status>(m, "Status")
        .value("ok", Status::ok)
        .value("out_of_memory", Status::out_of_memory)
        .value("unsupported", Status::unsupported)
        .value("launch_failed", Status::launch_failed)
        .value("invalid_argument", Status::invalid_argument)
        .value("interrupted", Status::interrupted);
    py::enum_<SquashKind>(m, "SquashKind")
        .value("sabour", SquashKind::sabour)
        .value("efficient", SquashKind::efficient);

    py::class_<Place>(m, "Place")
        // On the CPU. obeys_signals: for calls from Python's main thread.
        .def(py::init([](int threads, bool obeys_signals) {
                 Place place(threads);
                 if (obeys_signals) place.stop = &signal_raised;
                 return place;
             }),
             py::arg("threads"), py::arg("obeys_signals") = false)
        // On a GPU.
        .def(py::init([](int device, Address stream, Address workspace) {
            Place place(1);
            place.device = device, place.stream = at(stream), place.workspace = at(workspace);
            return place;
        }));
    py::class_<Counting, Place>(m, "Counting").def(py::init<int>()).def_readonly("bytes", &Counting::bytes);
    py::class_<Capsules>(m, "Capsules")
        .def(py::init([](Address u, Address weight, Address mask, int64_t B, int64_t N, int64_t K, int64_t J, int64_t D,
                         int64_t rows, int64_t weight_stride, Dtype dtype) {
            return Capsules{at(u), at(weight), at<uint8_t>(mask), B, N, K, J, D, rows, weight_stride, dtype, 1};
        }))
        .def("set_strides",
             [](Capsules& c, int64_t k, int64_t j, int64_t d) {
                 c.strided = true;
                 c.strides[0] = k, c.strides[1] = j, c.strides[2] = d;
             })
        .def_readwrite("own_gradients", &Capsules::own_gradients);
    py::class_<PrimaryCapsules>(m, "PrimaryCapsules")
        .def(py::init([](int64_t B, int64_t outer, int64_t inner, int64_t K, int64_t batch_stride, int64_t outer_stride,
                         int64_t inner_stride, int64_t component_stride, SquashKind kind, Dtype dtype) {
            return PrimaryCapsules{B,    outer, inner, K, batch_stride, outer_stride, inner_stride, component_stride,
                                   kind, dtype, 1};
        }));

    const auto probe = [](Probe what, int64_t size, int threads) {
        double rate = 0;
        if (size < 1 || size > most_numbers || !valid(Place(threads)))
            throw py::value_error("size and threads must be at least 1, and possible");
        if (cpu::kernels().probe(what, size, threads, &rate) != Status::ok) throw std::bad_alloc();
        return rate;
    };
    m.def("measure_read", [=](int64_t bytes, int threads) { return probe(Probe::read, bytes, threads); });
    m.def("measure_copy", [=](int64_t bytes, int threads) { return probe(Probe::copy, bytes, threads); });
    m.def("measure_fma", [=](int threads) { return probe(Probe::arithmetic, int64_t{1} << 24, threads); });

    m.def("instruction_set", &cpu::instruction_set);
    m.def("instruction_sets", &cpu::instruction_sets);
    m.def("use_instruction_set", &cpu::use_instruction_set);

    // Every operator returns Status::invalid_argument for what checks.h refuses, and for pointers that are null where
    // there is something to read or write. A gradient's pointer is null where it is not wanted.
    m.def("squash", [](const Place& place, Address s, Address v, int64_t rows, int64_t dim, SquashKind kind,
                       Dtype dtype) {
        const bool good = fits({rows, dim}) && points(at(s), {rows, dim}) && points(at(v), {rows, dim});
        return run(place, good, [&] { return kernels(place).squash(at(s), at(v), rows, dim, kind, dtype, place); });
    });
    m.def("squash_backward", [](const Place& place, Address g_v, Address s, Address g_s, int64_t rows, int64_t dim,
                                SquashKind kind, Dtype dtype) {
        const bool good = fits({rows, dim}) && points(at(g_v), {rows, dim}) && points(at(s), {rows, dim}) &&
                          points(at(g_s), {rows, dim});
        return run(place, good, [&] {
            return kernels(place).squash_backward(at(g_v), at(s), at(g_s), rows, dim, kind, dtype, place);
        });
    });
    m.def("primary_capsules", [](const Place& place, const PrimaryCapsules& p, Address features, Address u) {
        const bool good =
            valid(p) && points(at(features), {p.B, p.outer, p.inner}) && points(at(u), {p.B, p.outer, p.inner});
        return run(place, good, [&] { return kernels(place).primary_capsules(on(place, p), at(features), at(u)); });
    });
    m.def("primary_capsules_backward",
          [](const Place& place, const PrimaryCapsules& p, Address g_u, Address features, Address g_features) {
              const bool good = valid(p) && points(at(g_u), {p.B, p.outer, p.inner}) &&
                                points(at(features), {p.B, p.outer, p.inner}) &&
                                points(at(g_features), {p.B, p.outer, p.inner});
              return run(place, good, [&] {
                  return kernels(place).primary_capsules_backward(on(place, p), at(g_u), at(features), at(g_features));
              });
          });
    m.def("affine_votes", [](const Place& place, const Capsules& c, Address votes) {
        const bool good =
            valid(c) && can_run(place, c) && fits({c.B, c.N, c.J, c.rows, c.D}) && points(at(votes), {c.B, c.N});
        return run(place, good, [&] { return kernels(place, c).affine_votes(on(place, c), at(votes)); });
    });
    m.def("affine_votes_backward",
          [](const Place& place, const Capsules& c, Address g_votes, Address g_u, Address g_weight) {
              const bool good = valid(c) && can_run(place, c) && fits({c.B, c.N, c.J, c.rows, c.D}) &&
                                points(at(g_votes), {c.B, c.N});
              return run(place, good, [&] {
                  return kernels(place, c).affine_votes_backward(on(place, c), at(g_votes), {at(g_u), at(g_weight)});
              });
          });
    m.def("attention_routing", [](const Place& place, const Capsules& c, Address attn_weight, Address attn_bias,
                                  Address v, Address s) {
        const bool good =
            valid(c) && can_run(place, c) && at(attn_weight) && points(at(v), {c.B}) && points(at(s), {c.B});
        return run(place, good, [&] {
            return kernels(place, c).attention_routing(on(place, c), at(attn_weight), at(attn_bias), at(v), at(s));
        });
    });
    m.def("attention_routing_backward",
          [](const Place& place, const Capsules& c, Address attn_weight, Address attn_bias, Address s, Address g_v,
             Address g_u, Address g_weight, Address g_attn_weight, Address g_attn_bias) {
              const bool good =
                  valid(c) && can_run(place, c) && at(attn_weight) && points(at(s), {c.B}) && points(at(g_v), {c.B});
              return run(place, good, [&] {
                  return kernels(place, c).attention_routing_backward(on(place, c), at(attn_weight), at(attn_bias),
                                                                      at(s), at(g_v), {at(g_u), at(g_weight)},
                                                                      at(g_attn_weight), at(g_attn_bias));
              });
          });
    m.def("dynamic_routing", [](const Place& place, const Capsules& c, Address bias, int64_t iterations, bool leaky,
                                Address v, Address s) {
        const bool good = valid(c) && can_run(place, c) && iterations >= 1 &&
                          fits({iterations, c.B, c.J, c.rows, c.D}) && points(at(v), {c.B}) && points(at(s), {c.B});
        return run(place, good, [&] {
            return kernels(place, c).dynamic_routing(on(place, c), at(bias), iterations, leaky, at(v), at(s));
        });
    });
    m.def("dynamic_routing_backward", [](const Place& place, const Capsules& c, int64_t iterations, bool leaky,
                                         bool detach, Address s, Address g_v, Address g_u, Address g_weight,
                                         Address g_bias) {
        const bool good = valid(c) && can_run(place, c) && iterations >= 1 &&
                          fits({iterations, c.B, c.J, c.rows, c.D}) && points(at(s), {c.B}) && points(at(g_v), {c.B});
        return run(place, good, [&] {
            return kernels(place, c).dynamic_routing_backward(on(place, c), iterations, leaky, detach, at(s), at(g_v),
                                                              {at(g_u), at(g_weight)}, at(g_bias));
        });
    });
    m.def("self_attention_routing", [](const Place& place, const Capsules& c, Address prior, double scale, Address v,
                                       Address total, Address s) {
        const bool good =
            valid(c) && can_run(place, c) && points(at(v), {c.B}) && points(at(total), {c.B}) && points(at(s), {c.B});
        return run(place, good, [&] {
            return kernels(place, c).self_attention_routing(on(place, c), at(prior), scale, at(v), at(total), at(s));
        });
    });
    m.def("self_attention_routing_backward",
          [](const Place& place, const Capsules& c, Address prior, double scale, Address total, Address s, Address g_v,
             Address g_u, Address g_weight, Address g_prior) {
              const bool good = valid(c) && can_run(place, c) && points(at(total), {c.B}) && points(at(s), {c.B}) &&
                                points(at(g_v), {c.B});
              return run(place, good, [&] {
                  return kernels(place, c).self_attention_routing_backward(
                      on(place, c), at(prior), scale, at(total), at(s), at(g_v), {at(g_u), at(g_weight)}, at(g_prior));
              });
          });
    m.def("em_routing", [](const Place& place, const Capsules& c, Address activation, Address beta_u, Address beta_a,
                           const std::vector<double>& lambdas, Address mean, Address out_activation, Address state) {
        const int64_t iterations = static_cast<int64_t>(lambdas.size());
        const bool good = valid(c) && can_run(place, c) && iterations >= 1 &&
                          fits({iterations, c.B, c.J, c.rows, c.D}) && at(beta_u) && at(beta_a) &&
                          points(at(activation), {c.B, c.N}) && points(at(mean), {c.B}) &&
                          points(at(out_activation), {c.B}) && points(at(state), {c.B});
        return run(place, good, [&] {
            const auto kernel = kernels(place, c).em_routing;
            if (!kernel) return Status::unsupported;
            return kernel(on(place, c), at(activation), at(beta_u), at(beta_a), lambdas.data(), iterations, at(mean),
                          at(out_activation), at(state));
        });
    });
    m.def("em_routing_backward", [](const Place& place, const Capsules& c, Address activation, Address beta_u,
                                    const std::vector<double>& lambdas, Address state, Address g_mean,
                                    Address g_out_activation, Address g_u, Address g_weight, Address g_activation,
                                    Address g_beta_u, Address g_beta_a) {
        const int64_t iterations = static_cast<int64_t>(lambdas.size());
        const bool good = valid(c) && can_run(place, c) && iterations >= 1 &&
                          fits({iterations, c.B, c.J, c.rows, c.D}) && at(beta_u) &&
                          points(at(activation), {c.B, c.N}) && points(at(state), {c.B}) && points(at(g_mean), {c.B}) &&
                          points(at(g_out_activation), {c.B});
        return run(place, good, [&] {
            const auto kernel = kernels(place, c).em_routing_backward;
            if (!kernel) return Status::unsupported;
            return kernel(on(place, c), at(activation), at(beta_u), lambdas.data(), iterations, at(state), at(g_mean),
                          at(g_out_activation), {at(g_u), at(g_weight)}, at(g_activation), at(g_beta_u), at(g_beta_a));
        });
    });
}
