import json
import math
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binomtest
from sklearn import metrics as sklearn_metrics

from cardiocaps.metrics import (
    METRICS,
    Estimate,
    by_video,
    calibration_error_by_chance,
    confusion,
    decision_threshold,
    evaluate,
    evaluate_runs,
    expected_calibration_error,
    intervals,
    mean_by,
    regression_report,
    reliability,
    threshold_counts,
)
from cardiocaps.metrics.scores import Sample
from cardiocaps.runtime.files import write_json

NAN = math.nan


def _written(value: dict[str, Any], folder: Path) -> Any:
    """`value`, written as JSON and read again."""
    write_json(folder / "a.json", value)
    return json.loads((folder / "a.json").read_text(), parse_constant=pytest.fail)


def _sklearn(p: NDArray[np.float64], y: NDArray[np.int64]) -> dict[str, float]:
    hard = (p > 0.5).astype(int)
    return {
        "auroc": sklearn_metrics.roc_auc_score(y, p),
        "average_precision": sklearn_metrics.average_precision_score(y, p),
        "sensitivity": sklearn_metrics.recall_score(y, hard),
        "specificity": sklearn_metrics.recall_score(y, hard, pos_label=0),
        "f1": sklearn_metrics.f1_score(y, hard, zero_division=0),
        "f1_weighted": sklearn_metrics.f1_score(y, hard, average="weighted", zero_division=0),
        "accuracy": sklearn_metrics.accuracy_score(y, hard),
        "brier": sklearn_metrics.brier_score_loss(y, p),
    }


# Few distinct values, so that ties and 0.5 itself are common.
_samples = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.5000001, 0.75, 1.0]), st.integers(0, 1)),
    min_size=2,
    max_size=40,
)


def _split(pairs: list[tuple[float, int]]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    p, y = np.array([a for a, _ in pairs]), np.array([b for _, b in pairs])
    assume(0 < y.sum() < y.size)
    return p, y


@given(_samples)
@settings(max_examples=50, deadline=None)
def test_every_metric_is_scikit_learns(pairs: list[tuple[float, int]]) -> None:
    p, y = _split(pairs)
    report = evaluate(p, y, bootstrap=0)
    assert set(report.metrics) == set(METRICS)
    for name, expected in _sklearn(p, y).items():
        assert report.metrics[name].value == pytest.approx(expected, abs=1e-12), name
    assert not report.undefined


@given(_samples, st.data())
@settings(max_examples=40, deadline=None)
def test_a_weighted_resample_is_the_repeated_sample(pairs: list[tuple[float, int]], data: st.DataObject) -> None:
    p, y = _split(pairs)
    group = np.array(data.draw(st.lists(st.integers(0, 5), min_size=p.size, max_size=p.size)))
    group = np.unique(group, return_inverse=True)[1]
    count = int(group.max()) + 1
    weight = np.array(data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count)))
    repeats = weight[group]
    repeated_p, repeated_y = np.repeat(p, repeats), np.repeat(y, repeats)
    assume(0 < repeated_y.sum() < repeated_y.size)
    drawn = Sample.of(p, y, group).scores(weight[None].astype(float))
    for name, expected in _sklearn(repeated_p, repeated_y).items():
        assert drawn[name][0] == pytest.approx(expected, abs=1e-12), name


@given(_samples, st.randoms())
@settings(max_examples=40, deadline=None)
def test_the_order_of_the_samples_does_not_matter(pairs: list[tuple[float, int]], random) -> None:  # type: ignore[no-untyped-def]
    p, y = _split(pairs)
    clip = np.arange(p.size) // 3
    order = list(range(p.size))
    random.shuffle(order)
    one, other = (
        evaluate(p[index], y[index], clip[index], bootstrap=20, seed=1).as_dict()
        for index in (np.arange(p.size), np.array(order))
    )
    for name in METRICS:
        values = list(other["metrics"][name].values())
        assert list(one["metrics"][name].values()) == pytest.approx(values, nan_ok=True)
    assert one["paper"] == pytest.approx(other["paper"])


@given(_samples)
@settings(max_examples=40, deadline=None)
def test_ranks_decide_the_areas(pairs: list[tuple[float, int]]) -> None:
    p, y = _split(pairs)
    for name in ("auroc", "average_precision"):
        value, monotone = (evaluate(q, y, bootstrap=0).metrics[name].value for q in (p, p**3))
        assert value == pytest.approx(monotone, abs=1e-12)
    flipped = evaluate(1 - p, y, bootstrap=0).metrics["auroc"].value
    assert flipped == pytest.approx(1 - evaluate(p, y, bootstrap=0).metrics["auroc"].value, abs=1e-12)


def test_the_papers_metrics_by_hand() -> None:
    p = np.array([0.9, 0.8, 0.2, 0.7, 0.1, 0.3, 0.4, 0.5])
    y = np.array([1, 1, 1, 0, 0, 0, 0, 0])
    # tp 2, fn 1, fp 1, tn 4 (0.5 is not above the threshold)
    report = evaluate(p, y, bootstrap=0)
    assert report.confusion == ((4, 1), (1, 2))
    assert report.paper["accuracy"] == 6 / 8
    assert report.paper["f1"] == pytest.approx(5 / 8 * (8 / 10) + 3 / 8 * (4 / 6))
    assert report.paper["roc_auc"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert report.paper["pr_auc"] == pytest.approx(2 / 3)


def test_the_papers_metrics_of_a_model_that_predicts_one_class() -> None:
    # Table VI's row of EM-CapsNets (0.8478, 0.7780, 0.5, 0.0) is what always predicting "normal" gives.
    y = np.array([1] * 1522 + [0] * 8478)
    report = evaluate(np.full(y.size, 0.2), y, bootstrap=0)
    assert report.paper == pytest.approx({"accuracy": 0.8478, "f1": 0.7780, "roc_auc": 0.5, "pr_auc": 0.0}, abs=5e-5)


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_is_undefined_with_a_reason_and_not_zero(label: int, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = evaluate([0.2, 0.7, 0.9], [label] * 3, ["a", "a", "b"], bootstrap=50)
    undefined = {"auroc", "average_precision", "specificity" if label else "sensitivity", "paper.roc_auc"}
    assert undefined == set(report.undefined)
    assert f"every label is {label}" in report.undefined["auroc"]
    for name in undefined & set(METRICS):
        estimate = report.metrics[name]
        assert math.isnan(estimate.value) and math.isnan(estimate.low) and math.isnan(estimate.high)
        assert str(estimate) == "undefined"
    assert math.isfinite(report.metrics["accuracy"].value) and math.isfinite(report.metrics["brier"].low)
    written = _written(report.as_dict(), tmp_path)
    assert written["metrics"]["auroc"] == {"value": None, "low": None, "high": None, "method": None}
    assert written["paper"]["roc_auc"] is None


def test_f1_without_a_positive_anywhere_is_undefined() -> None:
    assert "f1" in evaluate([0.2, 0.1], [0, 0], bootstrap=0).undefined


def _videos(seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    clip = np.repeat(np.arange(40), 8)
    y = (clip < 10).astype(np.int64)
    logit = rng.normal(size=40)[clip] + 0.2 * rng.normal(size=clip.size) + 1.5 * y - 1
    return 1 / (1 + np.exp(-logit)), y, clip


def test_intervals_are_reproducible_and_hold_the_value() -> None:
    p, y, clip = _videos()
    report = evaluate(p, y, clip, bootstrap=300, seed=4)
    assert report == evaluate(p, y, clip, bootstrap=300, seed=4)
    assert report != evaluate(p, y, clip, bootstrap=300, seed=5)
    assert (report.n, report.positives, report.groups) == (320, 80, 40)
    for estimate in report.metrics.values():
        assert estimate.low < estimate.value < estimate.high and estimate.method == "bootstrap"
    assert not report.no_interval


def test_the_interval_spans_the_middle_95_percent_of_the_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    p, y, clip = _videos()
    drawn = {name: np.linspace(0, 1, 1001) ** 2 for name in METRICS}
    monkeypatch.setattr(intervals.Tested, "draw", lambda *_: drawn)
    auroc = evaluate(p, y, clip, bootstrap=1001).metrics["auroc"]
    assert (auroc.low, auroc.high) == pytest.approx((0.025**2, 0.975**2))


def test_whole_videos_are_drawn() -> None:
    p, y, clip = _videos()
    by_clip, by_frame = (evaluate(p, y, g, bootstrap=400).metrics["auroc"] for g in (clip, None))
    assert by_clip.value == by_frame.value
    assert by_clip.high - by_clip.low > 1.5 * (by_frame.high - by_frame.low)


def test_the_interval_is_that_of_a_plain_bootstrap() -> None:
    p, y, clip = _videos()
    rng = np.random.default_rng(1)
    frames = {c: np.flatnonzero(clip == c) for c in range(40)}
    values = []
    for _ in range(400):
        drawn = np.concatenate((rng.choice(np.arange(10), 10), rng.choice(np.arange(10, 40), 30)))
        index = np.concatenate([frames[c] for c in drawn])
        values.append(sklearn_metrics.roc_auc_score(y[index], p[index]))
    low, high = np.percentile(values, (2.5, 97.5))
    auroc = evaluate(p, y, clip, bootstrap=2000).metrics["auroc"]
    assert (auroc.low, auroc.high) == pytest.approx((low, high), abs=0.03)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 3), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_no_resample_loses_a_class(normal: int, abnormal: int, mixed: int, seed: int) -> None:
    clip = np.concatenate((np.arange(normal + abnormal + mixed), normal + abnormal + np.arange(mixed)))
    y = np.array([0] * normal + [1] * abnormal + [0] * mixed + [1] * mixed)
    strata = intervals.strata_of(y, clip)
    weight = intervals.draw_weights(strata, 50, np.random.default_rng(seed))
    assert (weight[:, :normal].sum(axis=1) == normal).all()
    assert (weight[:, normal : normal + abnormal].sum(axis=1) == abnormal).all()
    assert (weight[:, normal + abnormal :].sum(axis=1) == mixed).all()


def test_chunks_do_not_change_what_a_resample_is(monkeypatch: pytest.MonkeyPatch) -> None:
    p, y, clip = _videos()
    monkeypatch.setattr(intervals, "_CHUNK", 7 * p.size)
    report = evaluate(p, y, clip, bootstrap=300)
    monkeypatch.undo()
    whole = evaluate(p, y, clip, bootstrap=300)
    assert report.metrics["auroc"].low == pytest.approx(whole.metrics["auroc"].low, abs=0.03)


def test_proportions_of_single_samples_have_exact_intervals() -> None:
    """For ten right decisions of ten the bootstrap has no width; for nine, its low end exceeds the exact one of ten."""

    def sensitivity(right: int, n: int) -> Estimate:
        p = np.r_[[0.9] * right, [0.1] * (n - right), 0.1]
        return evaluate(p, [1] * n + [0], bootstrap=20).metrics["sensitivity"]

    for right, n, low, high in (
        (10, 10, 0.025 ** (1 / 10), 1.0),  # in closed form
        (72, 72, 0.025 ** (1 / 72), 1.0),
        (0, 10, 0.0, 1 - 0.025 ** (1 / 10)),
        (81, 263, 0.2527, 0.3676),  # Newcombe 1998, table I, method 5
        (15, 148, 0.0578, 0.1617),
        (0, 20, 0.0, 0.1684),
        (1, 29, 0.0009, 0.1776),
    ):
        found = sensitivity(right, n)
        assert (found.low, found.high, found.method) == (
            pytest.approx(low, abs=5e-5),
            pytest.approx(high, abs=5e-5),
            "exact",
        )
    assert sensitivity(9, 10).low < sensitivity(10, 10).low
    assert str(sensitivity(10, 10)) == "1.000 (0.692 to 1.000, exact)"


@given(st.integers(1, 300), st.data())
@settings(max_examples=40, deadline=None)
def test_the_exact_interval_is_scipys(trials: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, trials))
    expected = binomtest(right, trials).proportion_ci(0.95, method="exact")
    assert intervals.exact_interval(right, trials) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_every_metric_of_a_perfect_classifier_has_a_method_or_a_reason() -> None:
    report = evaluate(np.r_[[0.1] * 72, [0.9] * 18], np.r_[[0] * 72, [1] * 18], bootstrap=50)
    bounds = {"specificity": 72, "sensitivity": 18, "accuracy": 90, "auroc": 18}
    for name, trials in bounds.items():
        estimate = report.metrics[name]
        assert estimate.method == "exact" and estimate.high == 1
        assert estimate.low == pytest.approx(0.025 ** (1 / trials)), name
    without = {"average_precision", "f1", "f1_weighted", "brier"}
    assert set(report.no_interval) == without and set(METRICS) == without | set(bounds)
    for name in without:
        estimate = report.metrics[name]
        assert estimate.method == "no interval" and math.isnan(estimate.low) and "(no interval)" in str(estimate)
        assert "one and the same value" in report.as_dict()["no_interval"][name]
    reverse = evaluate(np.r_[[0.9] * 72, [0.1] * 18], np.r_[[0] * 72, [1] * 18], bootstrap=50).metrics["auroc"]
    assert (reverse.low, reverse.high) == (0, pytest.approx(1 - 0.025 ** (1 / 18)))
    assert evaluate([0.5] * 9, [0, 1, 0] * 3, bootstrap=50).metrics["auroc"].method == "no interval"


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6),
    st.integers(1, 4),
    st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_a_perfect_order_is_no_more_probable_than_the_auroc_to_the_number_of_pairs(
    weights: list[tuple[int, int]], positives: int, negatives: int
) -> None:
    """The inequality behind the exact bound of an AUROC, for any two distributions over a few values."""
    x, y = np.array(weights, float).T
    assume(x.sum() > 0 and y.sum() > 0)
    x, y = x / x.sum(), y / y.sum()
    above = 1 - np.cumsum(x)
    auroc = (y * (above + x / 2)).sum()
    below = np.cumsum(y) ** negatives
    perfect = (np.diff(below, prepend=0.0) * above**positives).sum()
    assert perfect <= auroc ** min(positives, negatives) + 1e-12


def test_a_perfect_order_can_be_as_probable_as_that() -> None:
    """No larger bound holds for all distributions. Here 50 normal samples have one value and 10 abnormal ones vary."""
    low = evaluate(np.r_[[0.1] * 50, [0.9] * 10], np.r_[[0] * 50, [1] * 10], bootstrap=5).metrics["auroc"].low
    rng = np.random.default_rng(0)
    perfect = (rng.random((200_000, 10)) < low).all(axis=1).mean()  # each abnormal above with probability AUROC
    assert perfect == pytest.approx(0.025, abs=0.001)


def test_whole_groups_are_counted_where_the_bootstrap_of_groups_has_no_width() -> None:
    clip = np.repeat(np.arange(30), 8)
    y = (clip < 12).astype(int)
    metric = evaluate(0.2 + 0.6 * y, y, clip, bootstrap=50).metrics
    for name, groups in (("sensitivity", 12), ("specificity", 18), ("accuracy", 30), ("auroc", 12)):
        assert metric[name].low == pytest.approx(0.025 ** (1 / groups)) and metric[name].method == "exact"
    # Three patients with videos of both labels make one pair; a single patient makes none.
    both = evaluate([0.1, 0.9] * 3, [0, 1] * 3, [0, 0, 1, 1, 2, 2], bootstrap=50).metrics["auroc"]
    assert both.low == pytest.approx(0.025)
    alone = evaluate([0.1, 0.9], [0, 1], [0, 0], bootstrap=50)
    assert alone.metrics["auroc"].method == "no interval" and "auroc" in alone.no_interval


def test_small_samples_are_noted_by_their_size() -> None:
    report = evaluate([0.1] * 40 + [0.9] * 2, [0] * 40 + [1] * 2, np.arange(42), bootstrap=10)
    assert report.notes == ("of 42 videos only 2 are abnormal: bootstrap intervals are about 89 % too narrow",)
    for n, words in ((1, "without meaning"), (5, "about 37 %"), (18, "about 10 %"), (34, "about 5 %")):
        report = evaluate([0.1] * 60 + [0.9] * n, [0] * 60 + [1] * n, bootstrap=10, group_name="patient")
        (note,) = report.notes
        assert f"of {60 + n} patients only {n} are abnormal" in note and words in note
    assert evaluate([0.1] * 60 + [0.9] * 40, [0] * 60 + [1] * 40, bootstrap=10).notes == ()


def test_a_small_bootstrap_is_as_narrow_as_its_note_says() -> None:
    rng = np.random.default_rng(0)
    n, widths = 18, []
    for _ in range(150):
        x = rng.normal(size=n)
        low, high = np.percentile(rng.choice(x, (1000, n)).mean(axis=1), (2.5, 97.5))
        student = 2 * 2.1098 * x.std(ddof=1) / math.sqrt(n)
        widths.append((high - low) / student)
    assert 1 - intervals.narrowness(n) == pytest.approx(np.mean(widths), abs=0.01)


def test_a_thousand_resamples_of_five_thousand_frames_take_less_than_two_cpu_seconds() -> None:
    rng = np.random.default_rng(0)
    clip = rng.integers(300, size=5000)
    p, y = rng.random(5000), (clip < 60).astype(int)
    evaluate(p, y, clip, bootstrap=10)
    seconds = []
    for _ in range(2):
        start = time.process_time()
        evaluate(p, y, clip, bootstrap=1000)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 2


def test_as_dict_can_be_written(tmp_path: Path) -> None:
    p, y, clip = _videos()
    report = _written(evaluate(p, y, clip, bootstrap=10).as_dict(), tmp_path)
    assert report["drawn"] == "videos" and report["confusion"][0][0] > 0
    assert report["bootstrap"] == {"resamples": 10, "seed": 0, "level": 0.95}
    without = _written(evaluate(p, y, clip, bootstrap=0).as_dict(), tmp_path)["metrics"]["auroc"]
    assert without["low"] is without["high"] is without["method"] is None and without["value"] > 0.5
    assert evaluate(p, y, clip, bootstrap=0).no_interval == {}, "where none was asked for, none is missing"


def test_a_threshold_moves_the_decisions_and_not_what_was_published() -> None:
    p, y = [0.9, 0.3, 0.2, 0.1], [1, 1, 0, 0]
    report = evaluate(p, y, bootstrap=0, threshold=0.25)
    assert report.confusion == ((2, 0), (0, 2)) and report.metrics["accuracy"].value == 1
    assert report.paper == evaluate(p, y, bootstrap=0).paper and report.paper["accuracy"] == 0.75
    assert report.threshold == report.as_dict()["threshold"] == 0.25
    assert confusion(p, y, 0.25).tolist() == [[2, 0], [0, 2]]
    # A probability that equals the threshold is not above it.
    assert evaluate(p, y, bootstrap=0, threshold=0.3).metrics["sensitivity"].value == 0.5


@pytest.mark.parametrize(
    ("p", "y", "expected"),
    [
        ([0.1, 0.2, 0.4, 0.9], [0, 0, 1, 1], 0.3),
        ([0.1, 0.2, 0.7, 0.9], [0, 0, 1, 0], 0.45),
        # 0.25 and 0.65 have the same index, 1/2: the one nearer to 0.5
        ([0.1, 0.4, 0.5, 0.8], [0, 1, 0, 1], 0.65),
        # 0.35 and 0.65 have the same index and the same distance: the smaller
        ([0.2, 0.5, 0.5, 0.8], [0, 0, 1, 1], 0.35),
        ([0.3, 0.3, 0.3], [0, 1, 0], 0.5),
        # worse than chance: the best threshold is still between two probabilities
        ([0.9, 0.8, 0.1], [0, 0, 1], 0.85),
    ],
)
def test_the_threshold_has_the_largest_youden_index(p: list[float], y: list[int], expected: float) -> None:
    assert decision_threshold(p, y)[0] == pytest.approx(expected)


@given(_samples)
@settings(max_examples=50, deadline=None)
def test_no_other_threshold_has_a_larger_youden_index(pairs: list[tuple[float, int]]) -> None:
    p, y = _split(pairs)
    assume(np.unique(p).size > 1)

    def youden(threshold: float) -> float:
        metric = evaluate(p, y, bootstrap=0, threshold=threshold).metrics
        return metric["sensitivity"].value + metric["specificity"].value

    distinct = np.unique(p)
    chosen = decision_threshold(p, y)[0]
    assert youden(chosen) == pytest.approx(max(youden(t) for t in (distinct[1:] + distinct[:-1]) / 2))


def test_a_threshold_between_neighbouring_floats_parts_them() -> None:
    low = 0.7
    high = float(np.nextafter(low, 1))
    assert decision_threshold([low, high], [0, 1])[0] == low


def test_a_validation_split_of_one_class_leaves_one_half_and_its_reason() -> None:
    assert decision_threshold([0.1, 0.2], [0, 1]) == (pytest.approx(0.15), None)
    assert decision_threshold([0.1, 0.2], [1, 1]) == (0.5, "every validation label is 1")


def test_the_mean_and_deviation_over_runs_by_hand() -> None:
    y = [1, 1, 0, 0]
    runs = [[0.9, 0.8, 0.1, 0.2], [0.9, 0.4, 0.6, 0.2], [0.9, 0.8, 0.6, 0.2]]
    report = evaluate_runs(runs, [y] * 3, bootstrap=0)
    accuracy = report.metrics["accuracy"]  # 1, 1/2, 3/4
    assert (accuracy.value, accuracy.sd) == pytest.approx((0.75, 0.25))
    assert math.isnan(accuracy.low) and math.isnan(accuracy.high)
    assert report.metrics["auroc"].value == pytest.approx((1 + 0.75 + 1) / 3)
    assert report.paper["accuracy"].value == 0.75 and report.paper["pr_auc"].value == pytest.approx(
        (1 + 1 / 2 + 2 / 3) / 3
    )
    assert report.confusion == ((4, 2), (1, 5)) and report.paired and len(report.runs) == 3
    at = evaluate_runs(runs, [y] * 3, thresholds=[0.5, 0.3, 0.7], bootstrap=0).metrics["accuracy"]
    assert at.value == pytest.approx((1 + 0.75 + 1) / 3)


def test_a_single_run_has_no_deviation_and_the_interval_of_evaluate() -> None:
    p, y, clip = _videos()
    single, report = evaluate_runs([p], [y], [clip], bootstrap=200, seed=3), evaluate(p, y, clip, bootstrap=200, seed=3)
    for name in METRICS:
        estimate = single.metrics[name]
        assert math.isnan(estimate.sd)
        assert (estimate.value, estimate.low, estimate.high) == (
            report.metrics[name].value,
            report.metrics[name].low,
            report.metrics[name].high,
        )


def test_runs_on_the_same_videos_share_the_resampled_videos() -> None:
    p, y, clip = _videos()
    one = evaluate(p, y, clip, bootstrap=300).metrics
    shuffled = np.random.default_rng(0).permutation(p.size)
    twice = evaluate_runs([p, p[shuffled]], [y, y[shuffled]], [clip, clip[shuffled]], bootstrap=300)
    assert twice.paired
    for name in METRICS:  # the mean of two equal runs varies as one run
        estimate = twice.metrics[name]
        assert (estimate.low, estimate.high) == pytest.approx((one[name].low, one[name].high))
        assert estimate.sd == pytest.approx(0, abs=1e-12)


def test_the_interval_of_paired_runs_is_that_of_a_plain_bootstrap_of_videos_and_runs() -> None:
    (p, y, clip), (q, _, _) = _videos(0), _videos(1)
    rng = np.random.default_rng(1)
    frames = {c: np.flatnonzero(clip == c) for c in range(40)}
    values = []
    for _ in range(400):
        drawn = np.concatenate((rng.choice(np.arange(10), 10), rng.choice(np.arange(10, 40), 30)))
        index = np.concatenate([frames[c] for c in drawn])
        runs = [(p, q)[i] for i in rng.integers(2, size=2)]
        values.append(np.mean([sklearn_metrics.roc_auc_score(y[index], x[index]) for x in runs]))
    auroc = evaluate_runs([p, q], [y, y], [clip, clip], bootstrap=2000).metrics["auroc"]
    assert (auroc.low, auroc.high) == pytest.approx(np.percentile(values, (2.5, 97.5)), abs=0.03)
    assert auroc.method == "bootstrap"


def test_the_interval_of_a_mean_covers_the_spread_of_its_runs() -> None:
    """One run of three learned nothing, as one of CNN-(1) did."""
    y = np.array([0] * 72 + [1] * 18)
    rng = np.random.default_rng(0)
    good = [np.where(y == 1, 0.8, 0.3) + 0.15 * rng.normal(size=90).clip(-1, 1) for _ in range(2)]
    report = evaluate_runs([*good, np.full(90, 0.5)], [y] * 3, [np.arange(90)] * 3, bootstrap=1000)
    auroc, values = report.metrics["auroc"], [run.metrics["auroc"].value for run in report.runs]
    assert auroc.sd > 0.2 and auroc.low <= min(values) and auroc.high >= max(values)
    assert "only 3 seeds: the part of bootstrap intervals due to seeds is about 63 % too narrow" in report.notes
    alike = evaluate_runs([good[0]] * 3, [y] * 3, [np.arange(90)] * 3, bootstrap=50)
    assert not any("seeds" in note for note in alike.notes)


def test_runs_that_are_all_right_have_the_exact_interval_of_their_videos() -> None:
    y = np.array([0] * 72 + [1] * 18)
    report = evaluate_runs([0.1 + 0.8 * y, 0.2 + 0.5 * y], [y] * 2, [np.arange(90)] * 2, bootstrap=50)
    specificity = report.metrics["specificity"]
    assert specificity.low == pytest.approx(0.025 ** (1 / 72)) and specificity.method == "exact/bootstrap"
    assert str(report.metrics["auroc"]) == "1.000 ± 0.000 (0.815 to 1.000, exact)"
    assert set(report.no_interval) == {"average_precision", "f1", "f1_weighted"}
    assert str(report.metrics["f1"]) == "1.000 ± 0.000 (no interval)"


def test_the_mean_of_equal_runs_is_as_uncertain_as_one_of_them() -> None:
    """And rare errors in one run of three do not make the interval narrower than no errors at all."""
    y, video = np.array([0] * 72 + [1] * 10), np.arange(82)
    right = 0.1 + 0.8 * y
    wrong = np.where(video == 81, 0.1, right)
    one = evaluate(wrong, y, video, bootstrap=200).metrics
    thrice = evaluate_runs([wrong] * 3, [y] * 3, [video] * 3, bootstrap=200).metrics
    for name in ("sensitivity", "specificity", "accuracy"):
        assert thrice[name].low <= one[name].low and thrice[name].high >= one[name].high
    some = evaluate_runs([right, right, wrong], [y] * 3, [video] * 3, bootstrap=200).metrics["sensitivity"]
    none = evaluate_runs([right] * 3, [y] * 3, [video] * 3, bootstrap=200).metrics["sensitivity"]
    assert one["sensitivity"].low < some.low < none.low and some.high == none.high == 1


def test_runs_on_other_videos_draw_by_themselves() -> None:
    p, y, clip = _videos()
    one = evaluate(p, y, clip, bootstrap=1000).metrics["auroc"]
    apart = evaluate_runs([p] * 4, [y] * 4, [clip + 100 * i for i in range(4)], bootstrap=1000)
    auroc = apart.metrics["auroc"]
    assert not apart.paired and auroc.value == pytest.approx(one.value)
    # Four runs, drawn with replacement, that draw different groups: the expected sum of squared weights is 7/16.
    assert auroc.high - auroc.low == pytest.approx((one.high - one.low) * math.sqrt(7) / 4, rel=0.2)
    other_labels = evaluate_runs([p, p], [y, 1 - y], [clip, clip], bootstrap=5)
    assert not other_labels.paired


def test_a_run_of_one_class_leaves_the_mean_undefined_with_its_reason() -> None:
    report = evaluate_runs([[0.1, 0.9], [0.2, 0.7]], [[0, 1], [0, 0]], [["a", "b"], ["c", "d"]], bootstrap=20)
    assert report.undefined["auroc"] == "run 2 of 2: every label is 0, the metric needs both classes"
    auroc = report.metrics["auroc"]
    assert all(math.isnan(x) for x in (auroc.value, auroc.sd, auroc.low, auroc.high)) and str(auroc) == "undefined"
    assert report.metrics["accuracy"].value == 0.75
    assert str(report.metrics["accuracy"]).startswith("0.750 ± 0.354 (0.")
    assert any("only 1 are abnormal" in note for note in report.notes)


def test_reliability_has_bins_of_equal_mass_and_keeps_ties_together() -> None:
    predicted, observed, size = reliability([0.1, 0.2, 0.6, 0.8], [0, 1, 1, 1], bins=2)
    assert predicted.tolist() == pytest.approx([0.15, 0.7])
    assert observed.tolist() == [0.5, 1] and size.tolist() == [2, 2]
    assert expected_calibration_error([0.1, 0.2, 0.6, 0.8], [0, 1, 1, 1], bins=2) == pytest.approx((0.35 + 0.3) / 2)
    assert reliability([0.4] * 7, [0, 0, 0, 1, 1, 1, 1], bins=5)[2].tolist() == [7]
    rng = np.random.default_rng(0)
    p = rng.random(20_000)
    assert expected_calibration_error(p, rng.random(20_000) < p) < 0.02
    assert reliability(p, p > 0.5)[2].tolist() == [2000] * 10
    # By chance: the mean over labels that are drawn with these probabilities, 300 as in the experiments.
    p = rng.beta(0.5, 2, 300)
    drawn = [expected_calibration_error(p, rng.random(300) < p) for _ in range(200)]
    assert calibration_error_by_chance(p) == pytest.approx(np.mean(drawn), abs=0.005) and np.mean(drawn) > 0.03


def test_by_video_is_the_mean_over_its_frames() -> None:
    p, y = by_video([0.2, 0.9, 0.4, 0.7], [0, 1, 0, 1], ["b", "a", "b", "a"])
    assert p.tolist() == pytest.approx([0.8, 0.3]) and y.tolist() == [1, 0]
    with pytest.raises(ValueError, match="differs within clip 7"):
        by_video([0.1, 0.2, 0.3], [0, 0, 1], [3, 7, 7])


def test_by_video_of_frames_that_are_certain_stays_a_probability() -> None:
    p, y = by_video(np.ones(49), np.ones(49), np.zeros(49, dtype=int))
    assert evaluate(p, y, bootstrap=0).metrics["accuracy"].value == 1


def test_confusion_has_the_truth_in_rows() -> None:
    assert confusion([0.9, 0.9, 0.1, 0.5], [0, 1, 1, 0]).tolist() == [[1, 1], [1, 1]]
    assert confusion([0.9, 0.9, 0.9], [0, 0, 1]).tolist() == [[0, 2], [0, 1]]


def test_threshold_counts_are_the_points_of_the_curve() -> None:
    threshold, tp, fp = threshold_counts([0.2, 0.8, 0.8, 0.5], [0, 1, 0, 1])
    assert threshold.tolist() == [math.inf, 0.8, 0.5, 0.2]
    assert tp.tolist() == [0, 1, 2, 2] and fp.tolist() == [0, 1, 1, 2]


def test_regression_report() -> None:
    report = regression_report([4.0, 5.0, 9.0, 6.0], [4.0, 6.0, NAN, 4.0], constant=5.0)
    truth, predicted = [4.0, 6.0, 4.0], [4.0, 5.0, 6.0]
    assert report.n == 3
    assert report.mae == pytest.approx(1.0)
    assert report.rmse == pytest.approx(math.sqrt(5 / 3))
    assert report.r2 == pytest.approx(sklearn_metrics.r2_score(truth, predicted))
    assert (report.constant, report.constant_mae, report.constant_rmse) == (5.0, 1.0, 1.0)
    assert not report.undefined


def test_regression_report_without_what_it_needs() -> None:
    nothing = regression_report([1.0], [NAN], constant=1.0)
    assert nothing.n == 0 and set(nothing.undefined) == {"mae", "rmse", "r2", "constant_mae", "constant_rmse"}
    assert math.isnan(nothing.as_dict()["rmse"])
    same = regression_report([1.0, 2.0], [0.1, 0.1])
    assert same.mae == pytest.approx(1.4) and math.isnan(same.r2) and math.isnan(same.constant_mae)
    assert set(same.undefined) == {"r2", "constant_mae", "constant_rmse"}


def test_mean_by() -> None:
    assert mean_by([1.0, 2.0, 6.0, NAN], ["b", "a", "b", "c"]).tolist() == pytest.approx([2.0, 3.5, NAN], nan_ok=True)
    with pytest.raises(ValueError, match=r"group is .*; expected .* of length 1"):
        mean_by([1.0], [1, 2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: evaluate([], []), "probability is empty"),
        (lambda: evaluate([0.1, NAN], [0, 1]), r"probability is nan \(at 1\); expected values in \[0, 1\]"),
        (lambda: evaluate([math.inf], [0]), "probability is inf"),
        (lambda: evaluate([1.5], [0]), r"probability is 1\.5"),
        (lambda: evaluate([-0.1], [0]), r"probability is -0\.1"),
        (lambda: evaluate([[0.1]], [0]), r"probability is float64 \[1, 1\]; expected numbers of shape \[n\]"),
        (lambda: evaluate(["high"], [0]), "probability is <U4 .*; expected numbers"),
        (lambda: evaluate([0.1, 0.2], [0]), "label has length 1; expected the length of probability, 2"),
        (lambda: evaluate([0.1], [2]), r"label is 2.0 \(at 0\); expected 0 or 1"),
        (lambda: evaluate([0.1], [NAN]), "label is nan .*; expected 0 or 1"),
        (lambda: evaluate([0.1], ["normal"]), "label is <U6 .*; expected numbers"),
        (lambda: evaluate([0.1, 0.2], [0, 1], [1]), "groups is .*; expected .* of length 2"),
        (lambda: evaluate([0.1, 0.2], [0, 1], [1.0, NAN]), "groups is float64 .*; expected integers or text"),
        (lambda: by_video([0.1], [0], [[1]]), "clip is "),
        (lambda: confusion([2.0], [0]), "probability is 2"),
        (lambda: regression_report([NAN], [1.0]), "prediction is nan; expected finite"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()
