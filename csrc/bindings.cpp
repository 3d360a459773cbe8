// capsops._C: pointers and sizes in, a status out, the GIL released while a kernel runs. Shapes, dtypes and contiguity
// have been checked in Python before a pointer gets here.

#include <cstdint>
#include <memory>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "routing.h"

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
        .value("launch_failed", Status::launch_failed);
    py::enum_<SquashKind>(m, "SquashKind")
        .value("sabour", SquashKind::sabour)
        .value("efficient", SquashKind::efficient);

    py::class_<Place>(m, "Place").def(py::init<int>()).def(py::init([](int device, Address stream, Address workspace) {
        Place place(1);
        place.device = device, place.stream = at(stream), place.workspace = at(workspace);
        return place;
    }));
    py::class_<Counting, Place>(m, "Counting").def(py::init<int>()).def_readonly("bytes", &Counting::bytes);
    py::class_<Capsules>(m, "Capsules")
        .def(py::init([](Address u, Address weight, Address mask, int64_t B, int64_t N, int64_t K, int64_t J, int64_t D,
                         int64_t rows, int64_t weight_stride, Dtype dtype) {
            return Capsules{at(u), at(weight), at<uint8_t>(mask), B, N, K, J, D, rows, weight_stride, dtype, 1};
        }));
    py::class_<PrimaryCapsules>(m, "PrimaryCapsules")
        .def(py::init([](int64_t B, int64_t outer, int64_t inner, int64_t K, int64_t batch_stride, int64_t outer_stride,
                         int64_t inner_stride, int64_t component_stride, SquashKind kind, Dtype dtype) {
            return PrimaryCapsules{B,    outer, inner, K, batch_stride, outer_stride, inner_stride, component_stride,
                                   kind, dtype, 1};
        }));

    const auto probe = [](Probe what, int64_t size, int threads) {
        double rate = 0;
        if (cpu::kernels().probe(what, size, threads, &rate) != Status::ok) throw std::bad_alloc();
        return rate;
    };
    m.def("measure_read", [=](int64_t bytes, int threads) { return probe(Probe::read, bytes, threads); });
    m.def("measure_copy", [=](int64_t bytes, int threads) { return probe(Probe::copy, bytes, threads); });
    m.def("measure_fma", [=](int threads) { return probe(Probe::arithmetic, int64_t{1} << 24, threads); });

    m.def("instruction_set", &cpu::instruction_set);
    m.def("instruction_sets", &cpu::instruction_sets);
    m.def("use_instruction_set", &cpu::use_instruction_set);

    using release = py::call_guard<py::gil_scoped_release>;

    m.def(
        "squash",
        [](const Place& place, Address s, Address v, int64_t rows, int64_t dim, SquashKind kind, Dtype dtype) {
            return kernels(place).squash(at(s), at(v), rows, dim, kind, dtype, place);
        },
        release());
    m.def(
        "squash_backward",
        [](const Place& place, Address g_v, Address s, Address g_s, int64_t rows, int64_t dim, SquashKind kind,
           Dtype dtype) {
            return kernels(place).squash_backward(at(g_v), at(s), at(g_s), rows, dim, kind, dtype, place);
        },
        release());
    m.def(
        "primary_capsules",
        [](const Place& place, const PrimaryCapsules& p, Address features, Address u) {
            return kernels(place).primary_capsules(on(place, p), at(features), at(u));
        },
        release());
    m.def(
        "primary_capsules_backward",
        [](const Place& place, const PrimaryCapsules& p, Address g_u, Address features, Address g_features) {
            return kernels(place).primary_capsules_backward(on(place, p), at(g_u), at(features), at(g_features));
        },
        release());
    m.def(
        "affine_votes",
        [](const Place& place, const Capsules& c, Address votes) {
            return kernels(place, c).affine_votes(on(place, c), at(votes));
        },
        release());
    m.def(
        "affine_votes_backward",
        [](const Place& place, const Capsules& c, Address g_votes, Address g_u, Address g_weight) {
            return kernels(place, c).affine_votes_backward(on(place, c), at(g_votes), {at(g_u), at(g_weight)});
        },
        release());
    m.def(
        "attention_routing",
        [](const Place& place, const Capsules& c, Address attn_weight, Address attn_bias, Address v, Address s) {
            return kernels(place, c).attention_routing(on(place, c), at(attn_weight), at(attn_bias), at(v), at(s));
        },
        release());
    m.def(
        "attention_routing_backward",
        [](const Place& place, const Capsules& c, Address attn_weight, Address attn_bias, Address s, Address g_v,
           Address g_u, Address g_weight, Address g_attn_weight, Address g_attn_bias) {
            return kernels(place, c).attention_routing_backward(on(place, c), at(attn_weight), at(attn_bias), at(s),
                                                                at(g_v), {at(g_u), at(g_weight)}, at(g_attn_weight),
                                                                at(g_attn_bias));
        },
        release());
    m.def(
        "dynamic_routing",
        [](const Place& place, const Capsules& c, Address bias, int iterations, bool leaky, Address v, Address s) {
            return kernels(place, c).dynamic_routing(on(place, c), at(bias), iterations, leaky, at(v), at(s));
        },
        release());
    m.def(
        "dynamic_routing_backward",
        [](const Place& place, const Capsules& c, int iterations, bool leaky, bool detach, Address s, Address g_v,
           Address g_u, Address g_weight, Address g_bias) {
            return kernels(place, c).dynamic_routing_backward(on(place, c), iterations, leaky, detach, at(s), at(g_v),
                                                              {at(g_u), at(g_weight)}, at(g_bias));
        },
        release());
    m.def(
        "self_attention_routing",
        [](const Place& place, const Capsules& c, Address prior, double scale, Address v, Address total, Address s) {
            return kernels(place, c).self_attention_routing(on(place, c), at(prior), scale, at(v), at(total), at(s));
        },
        release());
    m.def(
        "self_attention_routing_backward",
        [](const Place& place, const Capsules& c, Address prior, double scale, Address total, Address s, Address g_v,
           Address g_u, Address g_weight, Address g_prior) {
            return kernels(place, c).self_attention_routing_backward(on(place, c), at(prior), scale, at(total), at(s),
                                                                     at(g_v), {at(g_u), at(g_weight)}, at(g_prior));
        },
        release());
    m.def(
        "em_routing",
        [](const Place& place, const Capsules& c, Address activation, Address beta_u, Address beta_a,
           const std::vector<double>& lambdas, Address mean, Address out_activation, Address state) {
            return kernels(place, c).em_routing(on(place, c), at(activation), at(beta_u), at(beta_a), lambdas.data(),
                                                static_cast<int64_t>(lambdas.size()), at(mean), at(out_activation),
                                                at(state));
        },
        release());
    m.def(
        "em_routing_backward",
        [](const Place& place, const Capsules& c, Address activation, Address beta_u,
           const std::vector<double>& lambdas, Address state, Address g_mean, Address g_out_activation, Address g_u,
           Address g_weight, Address g_activation, Address g_beta_u, Address g_beta_a) {
            return kernels(place, c).em_routing_backward(on(place, c), at(activation), at(beta_u), lambdas.data(),
                                                         static_cast<int64_t>(lambdas.size()), at(state), at(g_mean),
                                                         at(g_out_activation), {at(g_u), at(g_weight)},
                                                         at(g_activation), at(g_beta_u), at(g_beta_a));
        },
        release());
}
