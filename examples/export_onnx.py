"""Export a capsule network to ONNX and run it with onnxruntime. Needs onnx, onnxscript and onnxruntime.

    python examples/export_onnx.py network.onnx

The file holds plain ONNX operators, so it runs where capsops and PyTorch are not installed, with a batch of any size.
They store the votes, as capsops does not. The program compares what onnxruntime computes with what capsops computes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import onnxruntime
import torch
from torch import nn

from capsops.nn import CapsuleLayer, PrimaryCapsules


def main() -> None:
    parser = argparse.ArgumentParser(description="Export a capsule network to ONNX and run it with onnxruntime.")
    parser.add_argument("file", type=Path, help="the file to write")
    options = parser.parse_args()
    torch.manual_seed(0)

    network = nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3),
        nn.ReLU(),
        PrimaryCapsules(32, types=8, dim=8, kernel_size=3, stride=1),
        CapsuleLayer(8 * 4 * 4, 8, 10, 16, routing="dynamic", iterations=3),
    ).eval()  # images [B, 1, 8, 8] -> capsules [B, 10, 16]

    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.onnx.export(network, (torch.rand(2, 1, 8, 8),), dynamic_shapes=({0: batch},), verbose=False)
    program.save(options.file)
    print(f"{options.file}: {options.file.stat().st_size / 1000:.0f} kB")

    session = onnxruntime.InferenceSession(options.file)
    (image,) = session.get_inputs()
    for size in (1, 7):
        images = torch.rand(size, 1, 8, 8)
        with torch.no_grad():
            expected = network(images)
        (found,) = session.run(None, {image.name: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
        print(f"batch of {size}: onnxruntime and capsops agree")


if __name__ == "__main__":
    main()
