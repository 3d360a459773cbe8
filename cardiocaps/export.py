"""`python -m cardiocaps.export RUN --to FORM --out FILE`: the best network of a run as one file for other programs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cardiocaps import DISCLAIMER
from cardiocaps.config import CommandLine, add_options, options
from cardiocaps.runtime.program import Interruption, run_program

_SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "torch-export": ".pt2"}
"""The forms, and how the names of their files end."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status, as `cardiocaps.train.main`."""
    parser = command_line()
    given = parser.parse_args(argv)
    if given.run.name == "pixel_baseline.json":
        parser.error(
            f"RUN is {given.run}; expected the folder of a run: its baseline on pixels is no network, and is not "
            "exported"
        )
    if not (given.run / "run.json").is_file():
        parser.error(f"RUN is {given.run}; expected the folder of a run")
    suffix = _SUFFIXES[given.form]
    if given.out.suffix != suffix:
        parser.error(f"--out is {given.out}; expected a name that ends in {suffix}, for --to {given.form}")

    def body(_: Interruption) -> None:
        from cardiocaps.prediction.export import export

        export(given.run, given.form, given.out, overwrite=given.overwrite, threads=given.threads)

    return run_program(body)


def command_line() -> CommandLine:
    """The parser of the program."""
    parser = CommandLine(
        prog="python -m cardiocaps.export",
        usage="%(prog)s RUN --to {safetensors,onnx,torch-export} --out FILE [options]",
        description="Write the best network of a run to one file. Before the file gets its name, it is read back and "
        "its outputs for random frames are compared with the network's.",
        epilog=DISCLAIMER,
    )
    path = options()["data"].from_text
    parser.add_argument("run", metavar="RUN", type=path, help="the folder of a run")
    parser.add_argument(
        "--to",
        dest="form",
        choices=list(_SUFFIXES),
        required=True,
        help="safetensors: the weights, for --init and other programs that build the network; onnx: a graph of plain "
        "ONNX operators, for onnxruntime; torch-export: a program of torch.export, which needs capsops",
    )
    parser.add_argument("--out", metavar="FILE", type=path, required=True, help="the new file")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    add_options(parser, ("threads",), default="torch decides")
    return parser


if __name__ == "__main__":
    sys.exit(main())
