// capsops._C: pointers and sizes in, a status out, the GIL released while a kernel runs. Shapes, dtypes and contiguity
// have been checked in Python before a pointer gets here.

#include <cstdint>

#include <pybind11/pybind11.h>

#include "routing.h"

namespace py = pybind11;
using namespace capsops;

namespace {

// A tensor's data_ptr(); 0 for one that is not there.
using Address = uintptr_t;

template <class T = void> T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled capsule-routing kernels. Use the functions of capsops, not these.";
#ifdef CAPSOPS_CUDA_ARCHS
    m.attr("cuda_architectures") = CAPSOPS_CUDA_ARCHS;
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
        .value("unsupported", Status::unsupported);
    py::enum_<SquashKind>(m, "SquashKind")
        .value("sabour", SquashKind::sabour)
        .value("efficient", SquashKind::efficient);

    py::class_<Capsules>(m, "Capsules")
        .def(py::init([](Address u, Address weight, Address mask, int64_t B, int64_t N, int64_t K, int64_t J, int64_t D,
                         int64_t weight_stride, Dtype dtype, int threads) {
                 return Capsules{at(u), at(weight), at<uint8_t>(mask), B, N, K, J, D, weight_stride, dtype, threads};
             }),
             py::kw_only(), py::arg("u"), py::arg("weight"), py::arg("mask"), py::arg("B"), py::arg("N"), py::arg("K"),
             py::arg("J"), py::arg("D"), py::arg("weight_stride"), py::arg("dtype"), py::arg("threads"));

    using release = py::call_guard<py::gil_scoped_release>;

    m.def(
        "squash",
        [](Address s, Address v, int64_t rows, int64_t dim, SquashKind kind, Dtype dtype, int threads) {
            return cpu::squash(at(s), at(v), rows, dim, kind, dtype, threads);
        },
        release());
    m.def(
        "squash_backward",
        [](Address g_v, Address s, Address g_s, int64_t rows, int64_t dim, SquashKind kind, Dtype dtype, int threads) {
            return cpu::squash_backward(at(g_v), at(s), at(g_s), rows, dim, kind, dtype, threads);
        },
        release());
    m.def("affine_votes", [](const Capsules& c, Address votes) { return cpu::affine_votes(c, at(votes)); }, release());
    m.def(
        "affine_votes_backward",
        [](const Capsules& c, Address g_votes, Address g_u, Address g_weight) {
            return cpu::affine_votes_backward(c, at(g_votes), {at(g_u), at(g_weight)});
        },
        release());
    m.def(
        "attention_routing",
        [](const Capsules& c, Address attn_weight, Address attn_bias, Address v, Address s) {
            return cpu::attention_routing(c, at(attn_weight), at(attn_bias), at(v), at(s));
        },
        release());
    m.def(
        "attention_routing_backward",
        [](const Capsules& c, Address attn_weight, Address attn_bias, Address s, Address g_v, Address g_u,
           Address g_weight, Address g_attn_weight, Address g_attn_bias) {
            return cpu::attention_routing_backward(c, at(attn_weight), at(attn_bias), at(s), at(g_v),
                                                   {at(g_u), at(g_weight)}, at(g_attn_weight), at(g_attn_bias));
        },
        release());
    m.def(
        "dynamic_routing",
        [](const Capsules& c, Address bias, int iterations, bool leaky, Address v, Address s) {
            return cpu::dynamic_routing(c, at(bias), iterations, leaky, at(v), at(s));
        },
        release());
    m.def(
        "dynamic_routing_backward",
        [](const Capsules& c, int iterations, bool leaky, bool detach, Address s, Address g_v, Address g_u,
           Address g_weight, Address g_bias) {
            return cpu::dynamic_routing_backward(c, iterations, leaky, detach, at(s), at(g_v), {at(g_u), at(g_weight)},
                                                 at(g_bias));
        },
        release());
}
