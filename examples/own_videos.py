"""Train CardioCaps on videos of your own, and predict further ones. Takes half a minute.

    python examples/own_videos.py own-example

A table with a label for each video is read as it is: `python -m cardiocaps.train --data FILE.csv` (docs/data-sets.md).
This program is for a study whose labels follow from several lengths, each with a threshold of its own, as those of
EchoNet-LVH do, but under other names and in millimetres. `in_layout` writes a folder in EchoNet-LVH's layout, with
links to your videos; change `COLUMNS` and the names in it to those of your table. The example makes up a study, of
beating rings, so that it runs without any data.

A video is abnormal if one of its measurements reaches a threshold (`--threshold`). Research use only. Not a medical
device.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import av
import numpy as np

from cardiocaps import evaluate, train

COLUMNS = {"septum_mm": "IVSd", "ventricle_mm": "LVIDd"}
"""Column of your table, in millimetres -> type of measurement of EchoNet-LVH, in centimetres."""


def in_layout(table: Path, out: Path, split: str = "") -> Mapping[str, str]:
    """Write a folder in EchoNet-LVH's layout for a table of your own.

    Args:
        table: a CSV file with the columns file (path of the video, from the table's folder), subject_code, and COLUMNS.
        out: a new folder.
        split: "test" for videos that are only predicted; "" to have all videos split at random, whole patients each.

    Returns:
        The name of each video in `out` -> its path in the table.
    """
    (out / "Batch1").mkdir(parents=True)
    names: dict[str, str] = {}
    with table.open(newline="") as source, (out / "MeasurementsList.csv").open("w", newline="") as target:
        writer = csv.writer(target)
        writer.writerow(("HashedFileName", "Calc", "CalcValue", "Frame", "Frames", "split", "subject_code"))
        for row in csv.DictReader(source):
            video = (table.parent / row["file"]).resolve()
            # Names have letters, digits, _ . and - only. A digest gives a video the same name in every folder, by which
            # a run recognises videos that it was trained on.
            name = hashlib.sha256(row["file"].encode()).hexdigest()[:16]
            names[name] = row["file"]
            (out / "Batch1" / name).with_suffix(video.suffix).symlink_to(video)
            for column, calc in COLUMNS.items():
                if row[column]:  # a blank cell: not measured
                    cm = float(row[column]) / 10
                    # Blank: the frame that was measured, and the number of frames of the video. Neither is needed.
                    writer.writerow((name, calc, f"{cm:.2f}", "", "", split, row["subject_code"]))
    return names


def make_up_study(folder: Path, patients: Iterable[int]) -> Path:
    """Two videos a patient, in which the ring of a wall contracts twice; returns their table."""
    (folder / "clips").mkdir(parents=True)
    y, x = np.mgrid[:96, :128]
    with (folder / "study.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "subject_code", *COLUMNS))
        for patient in patients:
            rng = np.random.default_rng(patient)
            wall = rng.uniform(14, 18) if patient % 3 == 0 else rng.uniform(7, 11)  # mm
            for clip in range(2):
                ventricle = rng.uniform(40, 50)  # mm
                name = f"clips/patient {patient:02d}, clip {clip}.mp4"
                with av.open(str(folder / name), "w") as container:
                    stream = container.add_stream("mpeg4", rate=25)
                    stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 128, 96, "yuv420p", 2_000_000
                    for phase in np.linspace(0, 4 * np.pi, 16):
                        depth = np.hypot(x - 64, y - 48) - ventricle / 2 * (0.9 + 0.1 * np.cos(phase))
                        grey = np.where((depth > 0) & (depth < wall), 200, 40) * rng.uniform(0.8, 1.2, y.shape)
                        image = np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
                        container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
                    container.mux(stream.encode())
                writer.writerow((name, f"S{patient:03d}", f"{wall:.1f}", f"{ventricle:.1f}" if clip else ""))
    return folder / "study.csv"


def main() -> int:
    parser = argparse.ArgumentParser(description="Train CardioCaps on videos of your own, and predict further ones.")
    parser.add_argument("folder", type=Path, help="a new folder; gets the study, the data sets and the run")
    parser.add_argument("--patients", type=int, default=30, help="to train on, with two videos each")
    parser.add_argument("--epochs", type=int, default=8)
    options, settings = parser.parse_known_args()  # further settings go to the training
    folder = options.folder

    n = options.patients
    in_layout(make_up_study(folder / "own", range(n)), folder / "data")
    names = in_layout(make_up_study(folder / "further", range(n, n + 6)), folder / "further data", split="test")

    # The programs `python -m cardiocaps.train` and `python -m cardiocaps.evaluate`, called from Python. The links leave
    # the data folder, so they need --follow-links.
    run, results = folder / "run", folder / "results"
    status = train.main(
        [
            *("--data", str(folder / "data"), "--follow-links", "--group-column", "subject_code"),
            *("--threshold", "IVSd=1.2", "--epochs", str(options.epochs), "--out", str(run)),
            *("--cache-dir", str(folder / "cache"), "--no-progress", *settings),
        ]
    )
    status = status or evaluate.main(
        [str(run), "--data", str(folder / "further data"), "--allow-changed-data", "--out", str(results)]
    )
    if status:
        return status

    print("further videos, their label and their prediction:")
    with (results / "predictions_by_video.csv").open() as table:
        for row in csv.DictReader(table):
            decision = "abnormal" if row["decision"] == "1" else "normal"
            print(f"  {names[row['video']]}: label {row['label']}, probability {row['probability']}: {decision}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
