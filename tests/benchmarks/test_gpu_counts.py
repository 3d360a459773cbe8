"""`python -m benchmarks.gpu_counts`: the reader and the interpreter of machine code, the rules of occupancy, the model;
and where the extension has kernels for sm_90, their machine code against the reference."""

import csv
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import capsops
from benchmarks import gpu_counts, gpu_model, sass, sass_run
from benchmarks.gpu_counts import BACKWARD
from benchmarks.gpu_model import H100, ModelError, Work, forecast, resident_blocks
from benchmarks.sass import SassError
from benchmarks.shapes import BOTH, EFFICIENT, FORWARD, PAPER, RECOMMENDER, ROUTINGS, Case, Shape

# As cuobjdump prints it: a load of a constant, a load into scoreboard 0, an instruction that waits for it, a branch.
RECORDED = """
Fatbin elf code:
================
arch = sm_90

	code for sm_90
		Function : _Z6sampleiPf
	.headerflags	@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;               /* 0x00000a00ff017b82 */
                                                                        /* 0x000fe20000000800 */
        /*0010*/                   LDC R5, c[0x0][RZ] ;                 /* 0x00000000ff057b82 */
                                                                        /* 0x000e240000000800 */
        /*0020*/                   IMAD R0, R5, UR6, R0.reuse ;         /* 0x0000000605007c24 */
                                                                        /* 0x001fca000f8e0200 */
        /*0030*/               @P0 EXIT ;                               /* 0x000000000000094d */
                                                                        /* 0x000fea0003800000 */
		..........


		Function : _Z5otherv
        /*0000*/                   EXIT ;                               /* 0x000000000000794d */
                                                                        /* 0x000fea0003800000 */
"""


def test_reads_what_cuobjdump_prints() -> None:
    first, second = sass.parse(RECORDED.splitlines())
    assert (first.name, first.architecture, len(first.instructions)) == ("_Z6sampleiPf", "sm_90", 4)
    assert (second.name, len(second.instructions)) == ("_Z5otherv", 1)
    load, slow, product, end = first.instructions
    assert (load.opcode, load.operands, load.stall, load.sets, load.waits) == (
        "LDC",
        ["R1", "c[0x0][0x28]"],
        1,
        None,
        (),
    )
    assert (slow.stall, slow.sets) == (2, 0)
    assert (product.address, product.operands, product.waits) == (0x20, ["R0", "R5", "UR6", "R0"], (0,))
    assert (end.guard, end.opcode, end.operands) == ("@P0", "EXIT", [])


def test_incomplete_instruction() -> None:
    (found,) = sass.parse(RECORDED.splitlines()[:9])
    with pytest.raises(SassError, match="expected 64 bits"):
        found.instructions  # noqa: B018


def test_short_name() -> None:
    (name,) = sass.demangled(["_ZN7capsops4cuda6squareINS_12_GLOBAL__N_17float16EEEvPT_S4_"])
    assert gpu_counts.short_name(name) == "square<float16>"


def kernel(lines: Sequence[str]) -> sass.Kernel:
    """A kernel of these instructions. One that begins with "n|" stalls for n cycles."""
    text = ["\tcode for sm_90", "\t\tFunction : hand_written"]
    for number, line in enumerate(lines):
        stall, _, code = line.rpartition("|")
        # No scoreboard is 7.
        control = int(stall or 1) | 7 << 5 | 7 << 8
        text += [f"        /*{16 * number:04x}*/  {code} ;  /* 0x{0:016x} */", f"   /* 0x{control << 41:016x} */"]
    (found,) = sass.parse(text)
    return found


# Threads write their number to rows of shared memory, as often as an argument says; then the first 16 threads do
# something that the others do not.
SAMPLE = (
    "S2R R0, SR_TID.X",
    "LDC R2, c[0x0][0x218]",
    "IMAD.SHL.U32 R3, R0, 0x80, RZ",
    "IADD3 R3, R3, 0x400, RZ",
    "STS [R3], R0",
    "4|IADD3 R2, R2, -0x1, RZ",
    "ISETP.NE.AND P0, PT, R2, RZ, PT",
    "@P0 BRA 0x40",
    "ISETP.GE.U32.AND P1, PT, R0, 0x10, PT",
    "BSSY B0, 0xc0",
    "@P1 BRA 0xc0",
    "MOV R5, 0x1",
    "BSYNC B0",
    "LDC.64 R8, c[0x0][0x210]",
    "IMAD.WIDE.U32 R8, R0, 0x4, R8",
    "STG.E desc[UR4][R8.64], R5",
    "EXIT",
)


def run_sample(trips: int) -> tuple[sass_run.Counts, np.ndarray]:
    out = np.full(256, 0xFF, np.uint8)
    buffer = sass_run.buffer(0, "out", 256, out)
    arguments = struct.pack("<Qi", buffer.base, trips)
    counts = sass_run.run_block(
        kernel(SAMPLE), arguments=arguments, grid=(1, 1, 1), block=(0, 0, 0), threads=64, shared_bytes=8192,
        memory=[buffer],
    )  # fmt: skip
    return counts, out.view(np.uint32)


@pytest.mark.parametrize("trips", [1, 3])
def test_instructions_of_two_warps(trips: int) -> None:
    counts, out = run_sample(trips)
    # Of each warp all lines but the one in the branch, which only the first warp has.
    assert sum(counts.instructions) == 2 * (12 + 4 * trips) + 1
    assert counts.instructions[4:8] == [2 * trips] * 4
    assert counts.wavefronts[4] == 2 * 32 * trips  # all threads of a warp in one bank
    assert (sum(counts.lines), sum(counts.sectors), counts.written, counts.read) == (2, 8, {"out": 256}, {})
    assert out.tolist() == [1] * 16 + [0] * 48


def test_stalls_take_time() -> None:
    assert run_sample(3)[0].cycles - run_sample(2)[0].cycles == 4 + 3


def test_longest_loop() -> None:
    found = kernel([*SAMPLE, "BRA 0x110"])  # behind the end, a branch to itself
    assert gpu_counts.kernel_loop(found, [1] * 18) == (4, 8)
    assert gpu_counts.kernel_loop(kernel(["EXIT", "BRA 0x10"]), [1, 0]) == (0, 0)


def test_unknown_instruction() -> None:
    with pytest.raises(SassError, match=r"opcode is FROBNICATE\.X; expected"):
        sass_run.run_block(
            kernel(["FROBNICATE.X R1, R2", "EXIT"]), arguments=b"", grid=(1, 1, 1), block=(0, 0, 0), threads=32,
            shared_bytes=0, memory=[],
        )  # fmt: skip


@pytest.mark.parametrize("line", ["LDG.E R1, desc[UR4][R8.64+0x100]", "LDS R1, [R0]", "LDS R1, [R8+0x402]"])
def test_access_out_of_bounds(line: str) -> None:
    buffer = sass_run.buffer(0, "x", 256)
    lines = ["LDC.64 R8, c[0x0][0x210]", line, "EXIT"]
    with pytest.raises(SassError, match=r"touches|has addresses"):
        sass_run.run_block(
            kernel(lines), arguments=struct.pack("<Q", buffer.base), grid=(1, 1, 1), block=(0, 0, 0), threads=32,
            shared_bytes=64, memory=[buffer],
        )  # fmt: skip


def value_of(line: str, **registers: int) -> int:
    """R20 of the first thread after an instruction. registers: R2 … R9."""
    out = np.zeros(4 * 32, np.uint8)
    buffer = sass_run.buffer(0, "out", out.size, out)
    lines = [f"MOV {name}, 0x{value:x}" for name, value in registers.items()]
    lines += [line, "S2R R0, SR_TID.X", "LDC.64 R10, c[0x0][0x210]", "IMAD.WIDE.U32 R10, R0, 0x4, R10"]
    sass_run.run_block(
        kernel([*lines, "STG.E desc[UR4][R10.64], R20", "EXIT"]), arguments=struct.pack("<Q", buffer.base),
        grid=(1, 1, 1), block=(0, 0, 0), threads=32, shared_bytes=0, memory=[buffer],
    )  # fmt: skip
    return int(out.view(np.uint32)[0])


@pytest.mark.parametrize(
    ("line", "registers", "expected"),
    [
        ("IMAD.HI.U32 R20, R2, R3, R4", {"R2": 0x80000000, "R3": 6, "R4": 0, "R5": 7}, 10),
        ("SHF.R.S32.HI R20, RZ, 0x1f, R2", {"R2": 0x80000000}, 0xFFFFFFFF),
        ("SHF.L.U64.HI R20, R2, 0x4, R3", {"R2": 0xF0000000, "R3": 1}, 0x1F),
        ("LOP3.LUT R20, R2, R3, R4, 0x96, !PT", {"R2": 0b1100, "R3": 0b1010, "R4": 0b1111}, 0b1001),
        ("LEA R20, R2, R3, 0x3", {"R2": 5, "R3": 2}, 42),
        ("PRMT R20, R2, 0x5410, R3", {"R2": 0xAAAABBBB, "R3": 0xCCCCDDDD}, 0xDDDDBBBB),
        ("IADD3 R20, R2, -R3, R4", {"R2": 9, "R3": 4, "R4": 1}, 6),
        ("F2I.U32.TRUNC.NTZ R20, R2", {"R2": 0x40600000}, 3),
        ("I2F.U32.RP R20, R2", {"R2": 0x1000001}, 0x4B800001),
        ("FFMA R20, -R2, R3, 1", {"R2": 0x40000000, "R3": 0x40400000}, 0xC0A00000),
        ("SHFL.BFLY PT, R20, R2, 0x1, 0x1f", {"R2": 7}, 7),
        ("MOVM.16.MT88 R20, R2", {"R2": 0x40003F80}, 0x3F803F80),
        # 2 + 8 · (1 · 3 + 2 · 4) / 2, in bfloat16: each lane has the same.
        ("HMMA.1688.F32.BF16 R20, R2, R4, R6", {"R2": 0x40003F80, "R4": 0x40804040, "R6": 0x40000000}, 0x42380000),
    ],
)
def test_arithmetic(line: str, registers: dict[str, int], expected: int) -> None:
    assert value_of(line, **registers) == expected


LANES = np.arange(32)


@pytest.mark.parametrize(
    ("addresses", "size", "passes"),
    [
        (4 * LANES, 4, 1),
        (8 * LANES, 4, 2),
        (132 * LANES, 4, 1),
        (128 * LANES, 4, 32),
        (0 * LANES, 4, 1),
        (np.where(LANES < 2, 128 * LANES, -1), 4, 2),
        (-1 + 0 * LANES, 4, 0),
        (8 * LANES, 8, 2),
        (8 * (LANES // 2), 8, 1),
        (16 * LANES, 16, 4),
        (0 * LANES, 16, 2),
        (128 * LANES, 16, 32),
    ],
)
def test_bank_conflicts(addresses: np.ndarray, size: int, passes: int) -> None:
    assert sass_run.wavefronts(addresses, size) == passes


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks"),
    [
        # By NVIDIA's occupancy calculator for compute capability 9.0.
        (256, 32, 0, 8),  # 64 warps
        (256, 64, 0, 4),  # all registers
        (256, 65, 0, 3),  # 72 for a thread, 7 warps for each scheduler
        (256, 128, 0, 2),
        (256, 164, 0, 1),  # 3 warps for each scheduler, 12 in all
        (128, 255, 0, 2),
        (1024, 64, 0, 1),
        (1024, 65, 0, 0),
        (32, 16, 0, 32),  # the most blocks
        (96, 32, 0, 21),  # 63 of 64 warps
        (128, 32, 48 << 10, 4),  # 49 KB with the reserved one
        (128, 32, 113 << 10, 2),
        (128, 32, 113 * 1024 + 1, 1),
        (128, 32, 227 << 10, 1),
    ],
)
def test_occupancy(threads: int, registers: int, shared: int, blocks: int) -> None:
    assert resident_blocks(threads, registers, shared) == blocks


@pytest.mark.parametrize("launch", [(1056, 32, 0), (256, 256, 0), (256, 32, 228 << 10), (0, 32, 0)])
def test_occupancy_of_what_cannot_be_launched(launch: tuple[int, int, int]) -> None:
    with pytest.raises(ModelError, match="expected at most"):
        resident_blocks(*launch)


WORK = Work(
    blocks=132, threads=256, registers=32, shared=0, instructions={"FFMA": 1000}, wavefronts=0, lines=0, l2_bytes=0,
    bytes=0, cycles=0,
)  # fmt: skip


def test_what_binds_a_launch() -> None:
    assert forecast(WORK).bound == "launch"
    for change, bound, cycles in [
        ({"instructions": {"FFMA": 4_000_000}}, "issue", 1_000_000),
        ({"instructions": {"INT": 4_000_000}}, "integer", 2_000_000),
        ({"instructions": {"MUFU": 1_000_000}}, "special", 2_000_000),
        ({"wavefronts": 600_000, "lines": 400_000}, "memory", 1_000_000),
        ({"cycles": 1_000_000}, "latency", 1_000_000),
        ({"cycles": 1_000_000, "blocks": 132 * 8 + 1}, "latency", 2_000_000),
        ({"instructions": {"FFMA": 4_000_000}, "blocks": 133}, "issue", 2_000_000),
        # Two warps for each scheduler, each of which alone would issue half of the time. Together they issue 4/5 of it,
        # because at times both want to.
        ({"instructions": {"FFMA": 4_000_000}, "cycles": 1_000_000}, "issue", 1_250_000),
    ]:
        found = forecast(replace(WORK, **change))  # type: ignore[arg-type]
        assert (found.bound, found.seconds) == (bound, pytest.approx(cycles * H100.stalls / H100.clock))
    found = forecast(replace(WORK, bytes=3_000_000_000))
    assert (found.bound, found.seconds, found.waves) == ("dram", pytest.approx(1e-3), 1 / 8)


@pytest.mark.parametrize(
    ("opcode", "name"),
    [
        ("FFMA.FTZ", "FFMA"),
        ("IMAD.WIDE.U32", "INT"),
        ("FSETP.GT.AND", "INT"),
        ("MUFU.EX2", "MUFU"),
        ("F2FP.BF16.F32.PACK_AB", "INT"),
        ("LDGSTS.E.128", "LDG"),
        ("MOVM.16.MT88", "SHFL"),
        ("LDS.128", "LDS"),
        ("UIADD3", "uniform"),
        ("BAR.SYNC.DEFER_BLOCKING", "BAR"),
        ("BRA", "branch"),
        ("DSETP.GT.OR", "DFMA"),
    ],
)
def test_classes(opcode: str, name: str) -> None:
    assert gpu_model.instruction_class(opcode) == name


# ---- the kernels of the extension ------------------------------------------------------------------------------------

built = pytest.mark.skipif(
    "90" not in (capsops._C.cuda_architectures or "").split(), reason="the extension has no kernels for sm_90"
)
TINY = Shape("paper", B=3, N=37, K=8, J=2, D=16)
MANY = Shape("mnist", B=5, N=11, K=3, J=10, D=6)
TOY_CASES = [
    Case(TINY, ROUTINGS["attention"]),
    Case(TINY, ROUTINGS["attention"], dtype="bfloat16"),
    Case(MANY, ROUTINGS["attention"]),
    Case(MANY, ROUTINGS["self-attention"]),
    Case(replace(MANY, shared=True, masked=True), ROUTINGS["uniform"]),
]


@pytest.fixture(scope="module")
def counter() -> gpu_counts.Counter:
    return gpu_counts.Counter(sass.read(capsops._C.__file__))


def contents(x: torch.Tensor) -> np.ndarray:
    return x.detach().contiguous().view(torch.uint8).numpy().ravel().copy()


@built
@pytest.mark.parametrize("case", TOY_CASES, ids=str)
def test_machine_code_computes_the_routing(case: Case, counter: gpu_counts.Counter) -> None:
    """The interpreter runs all blocks of an operator. Its results are those of the reference: it understands what it
    counts."""
    inputs = case.inputs()
    routing = {"uniform": "dynamic"}.get(case.routing.name, case.routing.name).replace("-", "_")
    options = {"iterations": 1} if case.routing.name == "uniform" else {}
    (g_v,) = case.output_gradients()
    with capsops.use_backend("reference"):
        wide = {name: x if name == "mask" else x.detach().double().requires_grad_() for name, x in inputs.items()}
        v = getattr(capsops, f"{routing}_routing")(**wide, **options)
        v.backward(g_v.double())
    out: dict[str, np.ndarray] = {}
    for direction in (FORWARD, BACKWARD):
        found = gpu_counts.launches(case, direction)
        buffers = {b.name: b for b in found[0].memory}
        for name, b in buffers.items():
            b.data = np.full(-(-b.size // 4) * 4, 0xFF, np.uint8)  # NaN
            if name in inputs:
                # Parameters are in the accumulation type.
                x = inputs[name] if name in ("u", "weight", "mask") else inputs[name].float()
                b.data[: b.size] = contents(x)
        if direction == BACKWARD:
            buffers["g_v"].data = contents(g_v.float())
            for name in ("s", "total"):
                buffers[name].data = out[name]
        for launch in found:
            assert launch.times == 1
            code = counter.kernels[launch.kernel]
            x_blocks, y_blocks, _ = launch.grid
            for x in range(x_blocks):
                for y in range(y_blocks):
                    sass_run.run_block(
                        code, arguments=launch.arguments, grid=launch.grid, block=(x, y, 0), threads=launch.threads,
                        shared_bytes=launch.shared, memory=launch.memory,
                    )  # fmt: skip
        results = ("v", "s", "total") if direction == FORWARD else [f"g_{name}" for name in inputs if name != "mask"]
        out |= {name: buffers[name].data for name in results}  # type: ignore[misc]

    def close(name: str, expected: torch.Tensor, dtype: torch.dtype) -> None:
        data = torch.from_numpy(out[name]).view(dtype)[: expected.numel()].view(expected.shape)
        tolerance = 2**-6 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(
            data.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
        )

    close("v", v.detach(), torch.float32)
    for name, x in wide.items():
        if x.grad is not None:
            close(f"g_{name}", x.grad, getattr(torch, case.dtype) if name in ("u", "weight") else torch.float32)


@built
@pytest.mark.parametrize("case", [Case(replace(PAPER, N=4096), ROUTINGS["attention"]),
                                  Case(EFFICIENT, ROUTINGS["self-attention"])], ids=str)  # fmt: skip
def test_rows_of_a_case(case: Case, counter: gpu_counts.Counter) -> None:
    rows = [row for direction in (FORWARD, BACKWARD) for row in counter.rows(case, direction)]
    assert set(gpu_counts.COLUMNS) == set(rows[0])
    names = " ".join(row["kernel"] for row in rows)
    loops = "_warps_kernel<4" if case.shape.name == "paper" else "_kernel<16, 2"
    assert f"reduce{loops}, float" in names
    assert f"emit{loops}, float" in names
    for row in rows:
        assert row["blocks"] > 0
        assert row["instructions_a_block"] > row["threads"] // 32
        assert row["resident_blocks"] == resident_blocks(row["threads"], row["registers"], row["shared_bytes"])
        assert float(row["forecast_us"]) * 1e-6 >= H100.launch * 0.999
        assert row["spilled_bytes"] == 0
    reading = next(row for row in rows if row["kernel"].startswith("reduce"))
    s = case.shape
    assert reading["bytes"] >= 4 * (s.u_numbers + s.weight_numbers)
    # No fewer multiply-adds than the votes take.
    lanes = 32
    assert float(reading["FFMA_a_capsule"]) >= s.B * s.K * s.J * s.D / lanes
    assert float(reading["loop_instructions_a_capsule"]) <= float(reading["instructions_a_capsule"])


@built
def test_masked_capsules_are_skipped(counter: gpu_counts.Counter) -> None:
    shape = replace(RECOMMENDER, B=16, K=8, J=8)  # a warp has one batch item
    every, some = (
        sum(float(row["instructions_a_capsule"]) for row in counter.rows(Case(s, ROUTINGS["uniform"]), FORWARD))
        for s in (replace(shape, masked=False), shape)
    )
    assert some < every


@built
def test_program(
    counter: gpu_counts.Counter, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_counts, "cases", lambda: [Case(EFFICIENT, ROUTINGS["self-attention"])])
    monkeypatch.setattr(gpu_counts, "Counter", lambda kernels: counter)  # which has counted it already
    first = tmp_path / "first.csv"
    assert gpu_counts.main(["--csv", str(first)]) == 0
    assert "self-attention" in capsys.readouterr().out
    with first.open() as file:
        rows = list(csv.DictReader(file))
    rows[0]["forecast_us"] = str(float(rows[0]["forecast_us"]) + 1000)
    with first.open("w") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    report = tmp_path / "counts.md"
    assert gpu_counts.main(["--baseline", str(first), "--markdown", str(report)]) == 0
    text = report.read_text()
    assert text.count(gpu_counts.MODEL) == 3
    total = gpu_counts.totals(rows)
    gains = [line.split(" | ")[-1] for line in text.splitlines() if f"| {FORWARD} |" in line or f"| {BOTH} |" in line]
    assert len(total) == 2
    assert all(float(gain.split()[0]) > 1 for gain in gains[:2])


def test_no_kernels(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_counts, "_extension", lambda: (_ for _ in ()).throw(gpu_counts.NoKernels("none")))
    assert gpu_counts.main([]) == 3
    assert "error: none" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "shape,routing\npaper,attention\n"])
def test_baseline_of_another_kind(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.csv"
    path.write_text(text)
    assert gpu_counts.main(["--baseline", str(path)]) == 3
    assert "has no column" in capsys.readouterr().err
