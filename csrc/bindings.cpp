// The Python module capsops._C: takes addresses and sizes, returns a status, and releases the GIL while a kernel runs.
// Python has checked shapes, dtypes and contiguity by then; a call with invalid sizes or pointers returns a status.

#include <dlfcn.h>

#include <chrono>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "checks.h"
#include "operators.h"

namespace py = pybind11;
using namespace capsops;

namespace {

// ---- the kernels -------------------------------------------------------------------------------------------------

// Null if they were not built.
const Kernels* gpu_kernels() {
#ifdef CAPSOPS_CUDA_ARCHS
    return &cuda::kernels;
#else
    return nullptr;
#endif
}

// Python asks for a GPU only if there are kernels for it.
const Kernels& require_gpu_kernels() {
    const Kernels* kernels = gpu_kernels();
    if (!kernels) throw py::value_error("capsops was built without CUDA kernels");
    return *kernels;
}

const Kernels& kernels_for(const ExecutionContext& context) {
    return context.device < 0 ? cpu::kernels() : require_gpu_kernels();
}
const Kernels& kernels_for(const PrimaryCapsules& p) {
    return kernels_for(p.context);
}
const Kernels& kernels_for(const Capsules& c) {
    return c.context.device < 0 ? cpu::kernels(c) : require_gpu_kernels();
}

// The names of the operators that a backend has a kernel for.
std::vector<std::string> operators(const std::string& backend) {
    if (backend != "cpu" && backend != "cuda")
        throw py::value_error("operators: backend is \"" + backend + "\"; expected \"cpu\" or \"cuda\"");
    std::vector<std::string> names;
    const Kernels* kernels = backend == "cpu" ? &cpu::kernels() : gpu_kernels();
    if (!kernels) return names;
#define CAPSOPS_APPEND_NAME(op) \
    if (kernels->op) names.emplace_back(#op);
    CAPSOPS_OPERATORS(CAPSOPS_APPEND_NAME)
    return names;
}

// ---- signals -----------------------------------------------------------------------------------------------------

// When the kernel that runs in this thread should next look for signals.
using Clock = std::chrono::steady_clock;
constexpr auto signal_interval = std::chrono::milliseconds(200);
thread_local Clock::time_point next_look;

// Python's signal handlers run only when the main thread runs Python code, which is after the kernel. So a kernel in
// that thread calls this now and then. Returns whether a handler raised an exception, as the one for Ctrl-C does.
bool signal_raised() {
    const Clock::time_point now = Clock::now();
    if (now < next_look) return false;
    const PyGILState_STATE gil = PyGILState_Ensure();
    const bool raised = PyErr_CheckSignals() != 0;
    PyGILState_Release(gil);
    next_look = Clock::now() + signal_interval;
    return raised;
}

// ---- a kernel as a Python function -------------------------------------------------------------------------------

// A tensor's data_ptr(); 0 is null.
using Address = uintptr_t;

template <class T = void> T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

// How Python passes a kernel's argument of type T.
template <class T> struct Argument {
    using Python = T;
    static T convert(T x) { return x; }
};
template <class T> struct Argument<T*> {
    using Python = Address;
    static T* convert(Address x) { return pointer<T>(x); }
};
template <> struct Argument<std::span<const double>> {
    using Python = std::vector<double>;
    static std::span<const double> convert(const std::vector<double>& x) { return x; }
};

// Runs a kernel without the GIL, if there is one and its arguments are valid.
template <class Operands, class... Rest>
Status run(Status (*Kernels::*op)(const Operands&, Rest...), bool (*valid)(const Operands&, Rest...),
           const ExecutionContext& context, const Operands& operands, Rest... rest) {
    if (!valid(operands, rest...)) return Status::invalid_argument;
    Status status;
    {
        const py::gil_scoped_release release;
        if (context.stop) next_look = Clock::now() + signal_interval;
        const auto kernel = kernels_for(operands).*op;
        status = kernel ? kernel(operands, rest...) : Status::unsupported;
    }
    // The signal handler's exception.
    if (status == Status::interrupted) throw py::error_already_set();
    return status;
}

// The Python function of an operator. It takes the context, then the other arguments of the kernel in their order.
template <class Operands, class... Rest>
auto bind(Status (*Kernels::*op)(const Operands&, Rest...), bool (*valid)(const Operands&, Rest...)) {
    return [=](const ExecutionContext& context, Operands operands, typename Argument<Rest>::Python... rest) {
        operands.context = context;
        return run(op, valid, context, operands, Argument<Rest>::convert(rest)...);
    };
}
template <class... Rest>
auto bind(Status (*Kernels::*op)(const ExecutionContext&, Rest...), bool (*valid)(const ExecutionContext&, Rest...)) {
    return [=](const ExecutionContext& context, typename Argument<Rest>::Python... rest) {
        return run(op, valid, context, context, Argument<Rest>::convert(rest)...);
    };
}

// A context on a GPU where nothing runs: an operator only writes how many bytes of workspace it needs.
struct WorkspaceQuery : ExecutionContext {
    int64_t bytes = 0;
    explicit WorkspaceQuery(int index) : ExecutionContext(1) { device = index, needed = &bytes; }
    WorkspaceQuery(const WorkspaceQuery&) = delete;
};

// A context on a GPU where nothing runs: an operator only lists the kernels that it would launch. No address that it
// gets is read or written.
struct LaunchQuery : ExecutionContext {
    std::vector<Launch> list;
    LaunchQuery(int index, Address workspace_) : ExecutionContext(1) {
        device = index, workspace = pointer(workspace_), launches = &list;
    }
    LaunchQuery(const LaunchQuery&) = delete;
};

// Where a function lies in this module, by which its symbol is found.
uintptr_t offset_in_module(const void* function) {
    Dl_info module{};
    dladdr(function, &module);
    return reinterpret_cast<uintptr_t>(function) - reinterpret_cast<uintptr_t>(module.dli_fbase);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled capsule-routing kernels. Use the functions of capsops instead.";
    m.attr("cuda_reason") = CAPSOPS_CUDA_REASON;  // why these kernels were compiled, or none
#ifdef CAPSOPS_CUDA_ARCHS
    m.attr("cuda_architectures") = CAPSOPS_CUDA_ARCHS;  // as in "80 90 90-virtual"
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
        .value("efficient", SquashKind::efficient)
        .value("none", SquashKind::none)
        .value("layer_norm", SquashKind::layer_norm);

    py::class_<ExecutionContext>(m, "ExecutionContext")
        // On the CPU. obeys_signals: for calls from Python's main thread.
        .def(py::init([](int threads, bool obeys_signals) {
                 ExecutionContext context(threads);
                 if (obeys_signals) context.stop = &signal_raised;
                 return context;
             }),
             py::arg("threads"), py::arg("obeys_signals") = false)
        // On a GPU.
        .def(py::init([](int device, Address stream, Address workspace) {
            ExecutionContext context(1);
            context.device = device, context.stream = pointer(stream), context.workspace = pointer(workspace);
            return context;
        }));
    py::class_<WorkspaceQuery, ExecutionContext>(m, "WorkspaceQuery")
        .def(py::init<int>())
        .def_readonly("bytes", &WorkspaceQuery::bytes);
    py::class_<Launch>(m, "Launch")
        .def_property_readonly("kernel_offset", [](const Launch& x) { return offset_in_module(x.kernel); })
        .def_property_readonly("grid", [](const Launch& x) { return py::make_tuple(x.grid[0], x.grid[1], x.grid[2]); })
        .def_readonly("threads", &Launch::threads)
        .def_readonly("shared_bytes", &Launch::shared_bytes)
        .def_property_readonly("arguments", [](const Launch& x) { return py::bytes(x.arguments); });
    py::class_<LaunchQuery, ExecutionContext>(m, "LaunchQuery")
        .def(py::init<int, Address>(), py::arg("device"), py::arg("workspace"))
        .def_property_readonly("launches", [](const LaunchQuery& q) { return q.list; });
    py::class_<Capsules>(m, "Capsules")
        .def(py::init([](Address u, Address weight, Address mask, int64_t B, int64_t N, int64_t K, int64_t J, int64_t D,
                         int64_t rows, int64_t weight_stride, Dtype dtype) {
            return Capsules{
                pointer(u), pointer(weight), pointer<uint8_t>(mask), B, N, K, J, D, rows, weight_stride, dtype, 1};
        }))
        .def("set_strides",
             [](Capsules& c, int64_t k, int64_t j, int64_t d) {
                 c.strided = true;
                 c.strides[0] = k, c.strides[1] = j, c.strides[2] = d;
             })
        .def_readwrite("own_gradients", &Capsules::own_gradients)
        .def_readwrite("votes_given", &Capsules::votes_given)
        .def_readwrite("one_vote", &Capsules::one_vote)
        .def_readwrite("J", &Capsules::J);
    py::class_<PrimaryCapsules>(m, "PrimaryCapsules")
        .def(py::init([](int64_t B, int64_t outer, int64_t inner, int64_t K, int64_t batch_stride, int64_t outer_stride,
                         int64_t inner_stride, int64_t component_stride, SquashKind kind, Dtype dtype) {
            return PrimaryCapsules{B,    outer, inner, K, batch_stride, outer_stride, inner_stride, component_stride,
                                   kind, dtype, 1};
        }));

    const auto probe = [](Probe what, int64_t size, int threads) {
        double rate = 0;
        if (size < 1 || size > max_numbers || !valid(ExecutionContext(threads)))
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

    m.def("operators", &operators, py::arg("backend"));
#define CAPSOPS_BIND(op) m.def(#op, bind(&Kernels::op, &checks::op));
    CAPSOPS_OPERATORS(CAPSOPS_BIND)
}
