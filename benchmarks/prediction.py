"""`cardiocaps predict` on its two engines: this process, and actors of Ray on this machine.

    python -m benchmarks.prediction                          1,000 videos of the phantom, 40 s to make
    python -m benchmarks.prediction --videos 4000 --rounds 3 --folder prediction

A round runs the local engine with one thread and with all, and Ray with one actor and with two, each in processes of
its own. Printed are the whole time of the command, the time until its first row, and the rows a second from the
hundredth on; below, Ray with two actors relative to the local engine. `--folder` keeps the videos and the run.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

WAYS = {
    "local, one thread": ["--threads", "1", "--decode-workers", "1"],
    "local": [],
    "Ray, one actor": ["--engine", "ray", "--workers", "1"],
    "Ray, two actors": ["--engine", "ray", "--workers", "2"],
}
_WARM = 100  # rows before the rate is measured


def _program(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"cardiocaps.{name}", *arguments, "--no-progress"]


def _prepare(folder: Path, videos: int) -> None:
    """Make the videos and the run that are not there yet."""
    phantom = [sys.executable, "-m", "cardiocaps.phantom", str(folder / f"phantom{videos}"), "--videos", str(videos)]
    short = ["--phantom-videos", "60", "--phantom-dir", str(folder / "phantom"), "--cache-dir", str(folder / "cache")]
    train = _program("train", *short, "--epochs", "1", "--bootstrap", "0", "--out", str(folder / "run"))
    for command, there in ((phantom, folder / f"phantom{videos}"), (train, folder / "run")):
        if not there.exists():
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _measure(folder: Path, videos: int, options: list[str]) -> tuple[float, float, float]:
    """Seconds in all, seconds until the first row, and rows a second."""
    out = folder / "predicted"
    shutil.rmtree(out, ignore_errors=True)
    command = _program("predict", str(folder / "run"), str(folder / f"phantom{videos}"), "--out", str(out), *options)
    start = time.monotonic()
    counts: list[tuple[float, int]] = []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            time.sleep(0.05)
            table = out / "predictions.csv"
            rows = table.read_bytes().count(b"\n") - 1 if table.exists() else 0
            if rows > 0 and (not counts or counts[-1][1] != rows):
                counts.append((time.monotonic() - start, rows))
        seconds = time.monotonic() - start
        if process.returncode or counts[-1][1] != videos:
            raise RuntimeError(f"{' '.join(command)} failed: {process.communicate()[1]}")
    begin, before = next(count for count in counts if count[1] >= _WARM)
    end, after = counts[-1]
    return seconds, counts[0][0], (after - before) / (end - begin)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prediction", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--videos", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="default: a temporary one, which is removed")
    given = parser.parse_args()
    if given.videos < 10 * _WARM or given.rounds < 1:
        parser.error(f"expected --videos of at least {10 * _WARM} and --rounds of at least 1")
    with tempfile.TemporaryDirectory() if given.folder is None else nullcontext(given.folder) as place:
        folder = Path(place).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        _prepare(folder, given.videos)
        rounds = [{way: _measure(folder, given.videos, WAYS[way]) for way in WAYS} for _ in range(given.rounds)]
    print(f"{given.videos:,} videos, medians of {given.rounds} rounds")
    for way in WAYS:
        seconds, first, rate = (statistics.median(one[way][i] for one in rounds) for i in range(3))
        print(f"{way:<18} {seconds:7.1f} s in all, first row after {first:5.1f} s, then {rate:6.1f} videos a second")
    for name, i, power in (("time in all", 0, 1), ("time of a video", 2, -1)):
        ratios = [(one["Ray, two actors"][i] / one["local"][i]) ** power for one in rounds]
        print(
            f"Ray, two actors / local: {name} {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    scaling = [one["Ray, two actors"][2] / one["Ray, one actor"][2] for one in rounds]
    print(f"Ray, two actors / one: videos a second {statistics.median(scaling):.2f}")


if __name__ == "__main__":
    main()
