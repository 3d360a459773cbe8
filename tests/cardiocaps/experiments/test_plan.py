"""The systems and the exhibits: all that the paper compares, under the same conditions."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cardiocaps.config import TrainConfig, options
from cardiocaps.data.fingerprint import Fingerprint
from cardiocaps.errors import ConfigError, DataError
from cardiocaps.experiments.__main__ import _as_typed, _default_out, _with_phantom, parser
from cardiocaps.experiments.exhibits import EXHIBITS, keys_of
from cardiocaps.experiments.folder import ExperimentFolder
from cardiocaps.experiments.plan import (
    FIRST_SEED,
    LAMBDAS,
    OF_PHANTOM,
    PHANTOM,
    PREVALENCES,
    SYSTEMS,
    TRAINING_VIDEOS,
    System,
    configure,
    corrected_key,
    jobs_of,
    trained_as,
)
from cardiocaps.phantom import Variant
from cardiocaps.phantom.patients import plan
from tests.cardiocaps.killed import killed_before

BASE = TrainConfig(seed=FIRST_SEED)
NETWORKS = [key for key, system in SYSTEMS.items() if "classifier" not in system.settings]


def _configured(key: str, seed: int = FIRST_SEED, base: TrainConfig = BASE) -> TrainConfig:
    return configure(base, SYSTEMS[key], seed, Path("folder"))


def test_every_row_of_the_paper_is_there() -> None:
    rows = {name: len(exhibit.systems) for name, exhibit in EXHIBITS.items()}
    assert [rows[f"table{i}"] for i in range(1, 7)] == [3, 3, 3, 10, 6, 3]
    assert [rows[f"fig{i}"] for i in range(3, 7)] == [3, 3, 3, len(LAMBDAS)]
    assert all(key in SYSTEMS for exhibit in EXHIBITS.values() for key in exhibit.systems)
    every = [exhibit.in_form("both") for exhibit in EXHIBITS.values()]
    assert set(keys_of(every, "video")) == set(SYSTEMS) - {"cardiocaps-video-protocol"}
    assert all(system.key == key for key, system in SYSTEMS.items())


def test_the_losses_of_table_1() -> None:
    margin, weighted, new = (_configured(key) for key in EXHIBITS["table1"].systems)
    assert {c.routing for c in (margin, weighted, new)} == {"dynamic"}
    assert (margin.class_weight, margin.regression_weight) == ("none", 0)
    assert (weighted.class_weight, weighted.regression_weight) == ("balanced", 0)
    assert (new.class_weight, new.regression_weight) == ("balanced", 0.05)


def test_the_sweep_has_the_default_once() -> None:
    weights = [_configured(key).regression_weight for key in EXHIBITS["fig6"].systems]
    assert weights == list(LAMBDAS)
    assert EXHIBITS["fig6"].systems[LAMBDAS.index(0.05)] == "cardiocaps"


@pytest.mark.parametrize("key", NETWORKS)
def test_nothing_but_the_system_differs(key: str) -> None:
    """Data, splits, class weights, early stopping and optimiser are those of CardioCaps."""
    base = replace(BASE, **PHANTOM)
    ours, its = (_configured(name, 12, base).as_dict() for name in ("cardiocaps", key))
    different = {name for name in ours if ours[name] != its[name]}
    allowed = set(SYSTEMS[key].settings)
    if key == "cardiocaps-paper-protocol":
        allowed |= {"limit", "frames_per_clip"}
    if allowed & set(OF_PHANTOM):
        allowed |= {"phantom_dir"}
    assert different <= allowed
    assert its["split_seed"] == FIRST_SEED and its["seed"] == 12


def test_every_row_of_the_papers_tables_has_a_published_form() -> None:
    for i in range(1, 7):
        exhibit = EXHIBITS[f"table{i}"]
        both = exhibit.in_form("both")
        assert both.systems[::2] == exhibit.systems == exhibit.in_form("corrected").systems
        assert both.systems[1::2] == exhibit.in_form("published").systems
        for ours, theirs in zip(exhibit.systems, both.systems[1::2], strict=True):
            assert corrected_key(theirs) == ours
            assert SYSTEMS[theirs].settings["form"] == "published" and SYSTEMS[theirs].note
            assert both.reported(theirs) is exhibit.reported(ours) is not None
    assert EXHIBITS["fig6"].in_form("both") == EXHIBITS["fig6"]


def test_what_a_published_form_is_made_of() -> None:
    dr = _configured("dr-published")
    assert (dr.form, dr.primary_layout, dr.decoder_mask, dr.routing) == ("published", "legacy", "predicted", "dynamic")
    for key in ("em-capsnet-published", "efficient-capsnet-published"):
        assert _configured(key).class_weight == "none" and _configured(key.removesuffix("-published")).class_weight
    assert _configured("em-capsnet-published").renormalise and not _configured("em-capsnet").renormalise
    at_paper = TrainConfig(seed=FIRST_SEED, preset="paper")
    sizes = {key: _configured(key, base=at_paper).batch_size for key in ("vit", "vit-published", "dr-published")}
    assert sizes == {"vit": 8, "vit-published": 16, "dr-published": 8}
    assert _configured("vit-published", base=replace(at_paper, batch_size=4)).batch_size == 4


def test_the_published_form_has_two_seeds_of_its_own() -> None:
    jobs = jobs_of(["cardiocaps", "vit-published"], 3)
    assert jobs == [
        ("cardiocaps", 10),
        ("vit-published", 10),
        ("cardiocaps", 11),
        ("vit-published", 1225),
        ("cardiocaps", 12),
    ]


def test_protocols() -> None:
    assert trained_as("cardiocaps-video-protocol", "video") == "cardiocaps"
    assert trained_as("cardiocaps-paper-protocol", "video") == "cardiocaps-paper-protocol"
    assert trained_as("cardiocaps-paper-protocol", "paper") == "cardiocaps"
    paper = _configured("cardiocaps-paper-protocol")
    assert (paper.protocol, paper.limit) == ("paper", 300)
    stratified = _configured("cardiocaps-paper-protocol", base=replace(BASE, split="stratified", limit=40))
    assert (stratified.split, stratified.limit) == ("auto", 40)
    frames = _configured("cardiocaps-frames")
    assert (frames.protocol, frames.split, frames.limit, frames.splits_frames) == ("video", "frames", None, True)
    published = TrainConfig(seed=FIRST_SEED, protocol="paper")
    assert _configured("cardiocaps-video-protocol", base=published).protocol == "video"
    assert _configured("cardiocaps", base=published).limit is None


def _others(key: str) -> tuple[list[object], list[object]]:
    """The patients of a system's phantom: those of the test, and those of training, without their folders."""
    config = _configured(key, base=replace(BASE, **PHANTOM))
    patients = plan(config.phantom_videos, config.phantom_seed, Variant.of(config))
    tested, trained = ([replace(p, batch=0) for p in patients if p.split == split] for split in ("test", "train"))
    return tested, trained


def test_the_learning_curve_has_one_test_and_the_sizes_that_it_names() -> None:
    tested, trained = _others("cardiocaps")
    assert (len(tested), len(trained)) == (300, 300)
    for videos in (75, 150, 600):
        assert f"{videos} training videos" in SYSTEMS[f"resnet18-{videos}-videos"].title
        others = _others(f"resnet18-{videos}-videos")
        assert others[0] == tested and len(others[1]) == videos
        assert sum(p.abnormal for p in others[1]) == videos / 5
        assert trained[: len(others[1])] == others[1][: len(trained)]
    assert sorted(TRAINING_VIDEOS) == [75, 150, 300, 600]
    assert [key for key in EXHIBITS["learning-curve"].systems if key.startswith("cnn-2")] == [
        "cnn-2-75-videos",
        "cnn-2-150-videos",
        "cnn-2",
        "cnn-2-600-videos",
    ]


def test_the_prevalence_is_that_of_training_alone() -> None:
    tested, trained = _others("cardiocaps")
    for share in PREVALENCES:
        key = "dr-margin" if share == 0.2 else f"dr-margin-abnormal-{share:g}"
        assert key in EXHIBITS["prevalence"].systems
        others = _others(key)
        assert others[0] == tested
        assert (len(others[1]), sum(p.abnormal for p in others[1])) == (len(trained), 300 * share)


def test_every_phantom_has_a_folder_of_its_own() -> None:
    base = replace(BASE, **PHANTOM, phantom_seed=3)
    phantoms: dict[Path, set[tuple[int, float]]] = {}
    for exhibit in (EXHIBITS["learning-curve"], EXHIBITS["prevalence"]):
        for key in exhibit.systems:
            config = _configured(key, base=base)
            phantoms.setdefault(config.phantom_dir, set()).add((config.phantom_videos, config.phantom_abnormal))
            assert (config.phantom_seed, config.phantom_test) == (3, 300)
    assert len(phantoms) == 8 and all(len(of_folder) == 1 for of_folder in phantoms.values())
    assert {folder.parent for folder in phantoms} == {Path()}
    assert all(folder.name.startswith("phantom-test300") for folder in phantoms)


@pytest.mark.parametrize(
    ("changed", "only", "message"),
    [
        ({"data": Path("study")}, None, "data is 'study'; expected null"),
        ({"phantom_test": None}, None, "phantom_test is None; expected"),
        ({"phantom_test": 200}, "learning-curve", "phantom_test is 200; expected 300"),
        ({"phantom_videos": 700}, "learning-curve", "phantom_videos is 700; expected 682"),
        ({"phantom_abnormal": 0.1}, None, "phantom_abnormal is 0.1; expected 0.2"),
        ({"split": "stratified"}, None, "split is 'stratified'; expected auto or column"),
        ({"protocol": "paper"}, None, "protocol is 'paper'; expected video"),
        ({"limit": 50}, None, "limit is 50; expected null"),
    ],
)
def test_what_other_phantoms_need(changed: dict[str, Any], only: str | None, message: str) -> None:
    base = replace(BASE, **{**PHANTOM, **changed})
    reasons = {name: exhibit.why_not(base) for name, exhibit in EXHIBITS.items()}
    refused = {name for name, reason in reasons.items() if reason is not None}
    assert refused == ({only} if only else {"learning-curve", "prevalence", "robustness"})
    for name in refused:
        assert re.search(message, str(reasons[name]))
    key = "cnn-2-75-videos" if "learning-curve" in refused else "cnn-2-abnormal-0.5"
    with pytest.raises(ConfigError, match=f"{key}: {message}"):
        _configured(key, base=base)


def test_the_record_of_a_phantom_is_its_own_and_that_of_the_experiment_keeps_its_name(tmp_path: Path) -> None:
    folder, base = ExperimentFolder(tmp_path), replace(BASE, **PHANTOM)
    folder.claim(base)
    other = configure(base, System("x", "X", {"phantom_abnormal": 0.05}), 10, tmp_path / "x")
    for number, config in enumerate((base, other)):
        record = Fingerprint(
            {str(number): ("train", "0", "0", "-")}, {}, table="", protocol="video", split_rule="column"
        )
        folder.claim_data(config, record)
        folder.claim_data(config, record)
    assert {path.name for path in folder.data.iterdir()} == {
        "video-auto.json",
        "video-auto-phantom_abnormal-0.05.json",
    }
    known = [folder.known_data(config) for config in (base, other)]
    assert [list(record.videos) for record in known if record] == [["0"], ["1"]]


def test_settings_of_several_parts_are_typed_again_as_they_were() -> None:
    typed = ["table6", "--threshold", "LVIDd=6", "--threshold", "IVSd=1.25", "--group-column", "who it was"]
    given = {name: value for name, value in vars(parser().parse_args(typed)).items() if name in options()}
    (threshold, column) = given["threshold"], given["group_column"]
    again = list(_as_typed({"threshold": threshold, "group_column": column}))
    assert again == ["--threshold LVIDd=6", "--threshold IVSd=1.25", "--group-column 'who it was'"]
    assert parser().parse_args(["table6", *shlex.split(" ".join(again))]).threshold == threshold


def test_a_folder_of_an_older_version_is_gone_on_with(tmp_path: Path) -> None:
    folder, config = ExperimentFolder(tmp_path), TrainConfig(channels_last=False)
    folder.claim(config)
    folder.jobs.mkdir()
    marker = json.loads(folder.marker.read_text())
    for name in ("threshold", "group_column", "allow_split_patients", "tf32"):
        del marker["settings"][name]
    folder.marker.write_text(json.dumps(marker))
    folder.claim(config)
    with pytest.raises(ConfigError, match=r"threshold is \{'IVSd': 1.2\}, was None"):
        folder.claim(replace(config, threshold={"IVSd": 1.2}))


def test_experiments_that_were_killed_at_any_point_of_their_beginning(tmp_path: Path) -> None:
    config = TrainConfig()

    def begin() -> None:
        folder.make()
        folder.claim(config)

    for step in itertools.count(1):
        folder = ExperimentFolder(tmp_path / str(step))
        if not killed_before(step, begin):
            break
        begin()
    assert step > 3


def test_a_table_that_lost_its_splits_is_not_taken_for_another_study(tmp_path: Path) -> None:
    def fingerprint(split: str, rule: str) -> Fingerprint:
        return Fingerprint({"a": (split, "0", "0", "-")}, {}, table="", protocol="video", split_rule=rule)

    folder, config = ExperimentFolder(tmp_path), TrainConfig()
    folder.claim_data(config, fingerprint("train", "column"))
    folder.claim_data(config, fingerprint("train", "column"))
    folder.claim_data(replace(config, split="frames"), fingerprint("mixed", "frames"))
    with pytest.raises(DataError, match="are about: 1 video changed its split; choose another --out"):
        folder.claim_data(config, fingerprint("test", "stratified"))


def test_an_experiment_without_data_has_a_large_test() -> None:
    given = _with_phantom(vars(parser().parse_args(["table1"])))
    assert (given["phantom_videos"], given["phantom_test"]) == (682, 300)
    assert "--phantom-test 300" in " ".join(_as_typed({name: given[name] for name in options() if name in given}))
    for typed in (["--data", "x"], ["--phantom-videos", "40"], ["--phantom-test", "20"]):
        plain = vars(parser().parse_args(["table1", *typed]))
        assert _with_phantom(plain) == plain
    named = vars(parser().parse_args(["table1", "--phantom-dir", "mine"]))
    assert str(_with_phantom(named)["phantom_dir"]) == "mine"


def test_each_phantom_has_folders_of_its_own_by_default() -> None:
    folders = {}
    for typed in ("", "difficulty hard", "difficulty hard seed 11", "abnormal 0.2", "abnormal 0.05 seed 11"):
        words = typed.split()
        arguments = [f"--phantom-{name}={value}" for name, value in zip(words[::2], words[1::2], strict=True)]
        given = vars(parser().parse_args(["table1", *arguments]))
        folders[str(_with_phantom(given)["phantom_dir"])] = str(_default_out(TrainConfig(preset="small"), given))
    assert folders == {
        "phantom-test300": "experiments/small",
        "phantom-test300-hard": "experiments/small-hard",
        "phantom-test300-hard-seed11": "experiments/small-hard-seed11",
        "phantom-test300-seed11-abnormal0.05": "experiments/small-seed11-abnormal0.05",
    }
    hard = vars(parser().parse_args(["table1", "--phantom-difficulty", "hard"]))
    assert str(_default_out(TrainConfig(data=Path("x")), hard)) == "experiments/tiny"
