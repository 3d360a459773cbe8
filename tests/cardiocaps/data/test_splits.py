import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cardiocaps.data import splits
from cardiocaps.data.problems import Problem
from cardiocaps.errors import DataError


def test_the_column_in_any_spelling() -> None:
    cells = {"a": ["train"], "b": ["val", ""], "c": ["valid", "validation"], "d": ["test", "test"]}
    assert splits.from_column(cells) == ({"a": "train", "b": "val", "c": "val", "d": "test"}, [])


def test_videos_without_a_known_split_are_reported() -> None:
    chosen, problems = splits.from_column({"a": ["", ""], "b": ["holdout"], "c": ["train", "holdout"]})
    assert chosen == {}
    blank, unknown = "split blank: allowed are train, val, test", "split unknown: allowed are train, val, test"
    assert problems == [Problem("a", blank), Problem("b", unknown), Problem("c", unknown)]


def test_a_video_in_two_splits_is_a_leak() -> None:
    with pytest.raises(DataError, match="video a stands in the splits test and train at once"):
        splits.from_column({"a": ["train", "test"]})


def test_stratified_shares_hold_in_each_class() -> None:
    labels = {f"V{i}": int(i < 30) for i in range(130)}
    chosen = splits.stratified(labels, seed=10)
    assert chosen.keys() == labels.keys()
    for label, total in ((0, 100), (1, 30)):
        sizes = [sum(chosen[n] == s for n in labels if labels[n] == label) for s in splits.SPLITS]
        assert sizes == [0.6 * total, 0.2 * total, 0.2 * total]


def test_stratified_depends_on_the_seed_and_not_on_the_order() -> None:
    labels = {f"V{i}": i % 2 for i in range(40)}
    backwards = dict(reversed(labels.items()))
    assert splits.stratified(labels, 1) == splits.stratified(backwards, 1)
    assert splits.stratified(labels, 1) != splits.stratified(labels, 2)


def test_patients_are_dealt_out_whole_and_by_class() -> None:
    labels = {f"V{i:03}": int(i % 10 == 0) for i in range(400)}  # every fifth patient of two videos has an abnormal one
    groups = {name: f"P{i // 2}" for i, name in enumerate(labels)}
    chosen = splits.stratified(labels, 10, groups=groups)
    assert list(chosen) == list(labels) and splits.divided(chosen, groups) == []
    for split, share in zip(splits.SPLITS, splits.SHARES, strict=True):
        of_split = [labels[name] for name in labels if chosen[name] == split]
        assert (len(of_split), sum(of_split)) == (share * 400, share * 40)
    # What the patients are called does not matter, nor in which order they come.
    again = {name: groups[name][::-1] + "!" for name in reversed(labels)}
    assert splits.stratified(dict(reversed(labels.items())), 10, groups=again) == chosen
    assert splits.stratified(labels, 11, groups=groups) != chosen


def test_patients_of_a_divided_split_are_found_once_each() -> None:
    chosen = {"a": "train", "b": "train", "c": "val", "d": "test", "e": "val"}
    groups = {"a": "1", "b": "2", "c": "1", "d": "1", "e": "3"}
    assert splits.divided(chosen, groups) == [("a", "c")]


@given(st.integers(3, 60), st.integers(0, 99))
def test_three_videos_of_a_class_reach_every_split(count: int, seed: int) -> None:
    assert set(splits.stratified({str(i): 0 for i in range(count)}, seed).values()) == set(splits.SPLITS)


def test_frames_follow_their_clip() -> None:
    items = splits.frame_items(["val", "train", "val", "test"], [1, 2, 2, 1], [0, 1, 1, 0], seed=0)
    assert {split: pairs.tolist() for split, pairs in items.items()} == {
        "train": [[0, 0], [0, 1]],
        "val": [[0, 0], [1, 0], [1, 1]],
        "test": [[0, 0]],
    }


def test_the_paper_deals_out_frames() -> None:
    labels = [0, 0, 1, 0, 0, 0, 0, 1, 0, 0]
    items = splits.frame_items([splits.MIXED] * 10, [50] * 10, labels, seed=3)
    assert [len(items[split]) for split in splits.SPLITS] == [300, 160, 40]
    abnormal = [sum(labels[clip] for clip in items[split][:, 0]) for split in splits.SPLITS]
    assert abnormal == [60, 32, 8], "the same share in every split"
    everything = np.concatenate([items[split] for split in splits.SPLITS])
    assert len({(int(clip), int(frame)) for clip, frame in everything}) == 500
    assert set(items["train"][:, 0]) & set(items["test"][:, 0])  # the leak that the warning speaks of
    again = splits.frame_items([splits.MIXED] * 10, [50] * 10, labels, seed=3)
    other = splits.frame_items([splits.MIXED] * 10, [50] * 10, labels, seed=4)
    np.testing.assert_array_equal(items["test"], again["test"])
    assert not np.array_equal(items["test"], other["test"])


def test_the_papers_rows_give_its_test_set() -> None:
    """276 rows with 50 frames each, 42 of them abnormal: the confusion matrices of the paper's tables have 1,104 frames
    and 168 abnormal ones."""
    labels = [int(i % 46 < 7) for i in range(276)]
    assert sum(labels) == 42
    items = splits.frame_items([splits.MIXED] * 276, [50] * 276, labels, seed=10)
    test = [labels[clip] for clip in items["test"][:, 0]]
    assert (len(test), sum(test)) == (1104, 168)
    assert [len(items[split]) for split in splits.SPLITS] == [8280, 4416, 1104]


@pytest.mark.parametrize("bad", [{"val": []}, {"test": [1, 1]}, {"train": [0]}])
def test_a_split_without_both_classes_is_refused(bad: dict[str, list[int]]) -> None:
    labels = {split: [0, 1, 1] for split in splits.SPLITS}
    splits.check(labels, "clips")
    with pytest.raises(DataError, match="each split needs clips of both classes") as caught:
        splits.check(labels | bad, "clips")
    ((split, values),) = bad.items()
    assert f"{split}: {values.count(0)} normal, {values.count(1)} abnormal" in str(caught.value)
