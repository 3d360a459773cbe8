"""Train CardioCaps on a data set in EchoNet-LVH's layout, evaluate it, and predict one video. Takes a minute.

    python examples/echonet_lvh_layout.py lvh-example

The videos are synthetic hearts (the phantom), written as EchoNet-LVH publishes its data: `Batch1` to `Batch4` with the
videos, and `MeasurementsList.csv` with a row for each measurement. With the real data set, leave out `write_phantom`
and give its folder as `--data`. Research use only. Not a medical device.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import torch

from cardiocaps import evaluate, train
from cardiocaps.config import read_run
from cardiocaps.data.cache import choose_frames
from cardiocaps.data.video import probe, read_frames
from cardiocaps.data.views import base_side, draw_jitter, three_views
from cardiocaps.evaluation.decision import read_decision
from cardiocaps.phantom import write_phantom
from cardiocaps.training.checkpoints import best_network, weights_digest
from cardiocaps.training.network import TrainedNetwork
from cardiocaps.training.run_folder import RunFolder


def predict(run: Path, video: Path) -> tuple[float, float]:
    """The probability that a video is abnormal, and the threshold of the run's decisions."""
    config, folder = read_run(run), RunFolder.open(run)
    classifier = best_network(config, folder, TrainedNetwork).eval()
    size = config.network.size

    # The frames and views that the run is evaluated on: frames spread over the video, three views of each.
    numbers = choose_frames(probe(video).frames, config.frames_per_clip, "spread")
    frames = torch.from_numpy(read_frames(video, numbers, base_side(size)))  # uint8 [T, 3, S, S]
    jitter, _ = draw_jitter(np.random.default_rng(), train=False)
    images = three_views(frames, size, torch.from_numpy(jitter).expand(len(frames), -1, -1))  # [T, 9, size, size]
    with torch.inference_mode():
        probability = classifier.model(images).probability.mean().item()

    decision = read_decision(folder.decision, weights_digest(classifier))
    return probability, decision.threshold if decision else 0.5


def main() -> int:
    parser = argparse.ArgumentParser(description="Train, evaluate and predict on data in EchoNet-LVH's layout.")
    parser.add_argument("folder", type=Path, help="a new folder; gets the data set and the run")
    parser.add_argument("--videos", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=8)
    options, settings = parser.parse_known_args()  # further settings go to the training
    data, run = options.folder / "data", options.folder / "run"

    write_phantom(data, options.videos, seed=1, processes=1)
    with (data / "MeasurementsList.csv").open() as table:
        print("the first lines of MeasurementsList.csv:", *table.readlines()[:4], sep="\n  ", end="")

    # The programs `python -m cardiocaps.train` and `python -m cardiocaps.evaluate`, called from Python.
    chosen = ["--data", str(data), "--preset", "tiny", "--epochs", str(options.epochs), "--out", str(run)]
    status = train.main([*chosen, "--cache-dir", str(options.folder / "cache"), "--no-progress", *settings])
    status = status or evaluate.main([str(run)])  # the same table again, from the run folder
    if status:
        return status

    with (run / "predictions_by_video.csv").open() as table:
        known = next(csv.DictReader(table))
    (video,) = data.glob(f"Batch*/{known['video']}.avi")
    probability, threshold = predict(run, video)
    decision = "abnormal" if probability > threshold else "normal"
    print(f"{video.name}: probability {probability:.4f}, threshold {threshold:.4f}: {decision}")
    print(f"predictions_by_video.csv has {float(known['probability']):.4f}, and the label {known['label']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
