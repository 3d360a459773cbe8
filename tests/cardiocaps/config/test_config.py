import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cardiocaps.config import (
    PRESETS,
    Option,
    TrainConfig,
    check_resumable,
    command_line,
    from_command_line,
    options,
    read_yaml,
    settings_that_affect,
)
from cardiocaps.errors import ConfigError


def _file(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_are_the_published_choices() -> None:
    config = TrainConfig()
    assert (config.seed, config.iterations, config.reconstruction_weight, config.regression_weight) == (
        10,
        3,
        0.0005,
        0.05,
    )
    paper = PRESETS["paper"]
    assert (paper.size, paper.conv_channels, paper.primary_types, paper.primary_dim, paper.out_dim) == (
        256,
        256,
        32,
        8,
        16,
    )
    assert (paper.batch_size, paper.learning_rate, paper.epochs, paper.patience) == (8, 1e-4, 100, 5)


def test_every_preset_has_a_choice_and_a_network_that_fits() -> None:
    assert set(options()["preset"].choices) == set(PRESETS)
    for preset in PRESETS.values():
        conv = (preset.size - preset.conv_kernel) // preset.conv_stride + 1
        primary = (conv - preset.primary_kernel) // preset.primary_stride + 1
        assert primary >= 1
        TrainConfig(batch_size=preset.batch_size, learning_rate=preset.learning_rate)
    paper = PRESETS["paper"]
    conv = paper.size - paper.conv_kernel + 1
    assert paper.primary_types * ((conv - paper.primary_kernel) // paper.primary_stride + 1) ** 2 == 460_800


def test_precedence(tmp_path: Path) -> None:
    config = from_command_line(["--preset", "small"])
    assert (config.epochs, config.batch_size, config.seed) == (40, 16, 10)
    file = str(_file(tmp_path, "preset: small\nepochs: 7\nseed: 3\nlearning_rate: 1e-4\n"))
    config = from_command_line(["--config", file])
    assert (config.epochs, config.batch_size, config.seed, config.learning_rate) == (7, 16, 3, 1e-4)
    config = from_command_line(["--config", file, "--epochs", "9", "--preset", "paper"])
    assert (config.epochs, config.batch_size, config.seed) == (9, 8, 3)


def test_the_folder_is_named_after_the_run() -> None:
    assert from_command_line([]).out == Path("runs/tiny-attention-seed10")
    assert from_command_line(["--routing", "dynamic", "--seed", "4"]).out == Path("runs/tiny-dynamic-seed4")
    assert from_command_line(["--out", "here"]).out == Path("here")


def _another(option: Option, value: Any) -> Any:
    """A value that is allowed and differs from `value`."""
    if option.kind is dict:
        return {"some name": option.low}
    if option.choices:
        return next(choice for choice in option.choices if choice != value)
    if option.kind is bool:
        return not value
    if option.kind is Path:
        return Path("some where")
    if option.name == "logger":
        return "csv,wandb"
    if option.kind is str:
        return "some text"
    return option.low if value == option.high else option.high


def test_every_setting_can_be_given_on_the_command_line() -> None:
    for name in sorted(set(options()) - {"resume"}):
        option = options()[name]
        value = _another(option, option.default)
        text = "=".join(map(str, *value.items())) if option.kind is dict else str(value)
        argv = [option.flag, text]
        if option.kind is bool:
            argv = [option.flag if value else option.flag.replace("--", "--no-")]
        if name == "renormalise":
            argv += ["--model", "em-capsnet"]
        assert getattr(from_command_line(argv), name) == value, name


def test_help_shows_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        from_command_line(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.isascii()  # printable wherever it is asked for
    for option in options().values():
        assert option.flag in text
    assert "Research use only" in text


def test_help_needs_no_heavy_import() -> None:
    program = (
        "import sys, time; start = time.process_time()\n"
        "from cardiocaps.config import command_line; command_line().format_help()\n"
        "print(time.process_time() - start)\n"
        "print(sorted(sys.modules.keys() & {'torch', 'numpy', 'yaml', 'lightning', 'matplotlib', 'pandas'}))"
    )
    seconds = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        spent, modules = done.stdout.splitlines()
        assert modules == "[]"
        seconds.append(float(spent))
    assert min(seconds) < 0.2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning-rat", "1"], "unknown option --learning-rat; did you mean --learning-rate?"),
        (["--learning_rate=1"], "unknown option --learning_rate; did you mean --learning-rate?"),
        (["--learn", "1"], "unknown option --learn; did you mean --learning-rate?"),
        (["--no-progres"], "unknown option --no-progres; did you mean --no-progress?"),
        (["--xyzzy"], "unknown option --xyzzy (see"),
        (["extra"], "unexpected argument 'extra'"),
        (["--seed"], "--seed: expected one argument"),
        (["--seed", "-1"], "--seed is -1; expected an integer from 0 to 4294967295"),
        (["--seed", "1.0"], "--seed is '1.0'; expected an integer"),
        (["--seed", "1_0"], "--seed is '1_0'"),
        (["--seed", "9" * 5000], "--seed is '99"),
        (["--iterations", "11"], "--iterations is 11; expected an integer from 1 to 10"),
        (["--learning-rate", "nan"], "--learning-rate is 'nan'; expected a number from 1e-09 to 1"),
        (["--learning-rate", "1e999"], "--learning-rate is '1e999'"),
        (["--learning-rate", "0"], "--learning-rate is '0'"),
        (["--max-bad-share", "inf"], "--max-bad-share is 'inf'; expected a number from 0 to 1"),
        (["--routing", "atention"], "--routing is 'atention'; expected one of attention, dynamic"),
        (["--out", ""], "--out is ''; expected a path"),
        (["--threads", "0"], "--threads is 0; expected an integer from 1 to 1024 (see"),
        (["--progress=no"], "ignored explicit argument 'no'"),
        (["--device", "mps"], "--device is 'mps'; expected one of auto, cpu, cuda"),
        (["--precision", "fp16"], "--precision is 'fp16'; expected one of 32, bf16"),
        (["--tf32=1"], "--tf32/--no-tf32: ignored explicit argument '1'"),
        (["--channel-last"], "unknown option --channel-last; did you mean --channels-last?"),
        (["--threshold", "IVSd"], "--threshold is 'IVSd'; expected numbers from -1000000000 to 1000000000 for names"),
        (["--threshold", "=12"], "--threshold is '=12'; expected"),
        (["--threshold", "IVSd=1e10"], "--threshold is 'IVSd=1e10'; expected"),
        (["--threshold", "IVSd=thick"], "--threshold is 'IVSd=thick'; expected"),
        (["--dataset", "echonet"], "--dataset is 'echonet'; expected one of auto, echonet-lvh, echonet-dynamic"),
        (["--threshold", "IVSd=1.2", "--threshold", "IVSd=1.3"], "--threshold: IVSd is given twice"),
        (["--group-column", " "], "--group-column is ' '; expected text of 1 to 100 characters"),
        (["--data", "~nobody-of-this-name/x"], "'~nobody-of-this-name/x'; expected a path without"),
        (["--\x1b[31mred\n\u202e"], r"unknown option --\x1b[31mred\n\u202e (see"),
        (["--seed\x1b[31m=1"], r"unknown option --seed\x1b[31m; did you mean --seed?"),
        (["--progress=\x1b[31m"], r"ignored explicit argument '\x1b[31m'"),
        (["--seed", "9" * 60_000 + "x"], "--seed is '99"),
        (["--learning-rate", "9" * 120_000 + "x"], "--learning-rate is '99"),
        (["--" + "x" * 120_000], "unknown option --xx"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_status_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        from_command_line(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and len(error) < 400
    assert message in error and error[:-1].isprintable()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown setting 'learning_rat'; did you mean learning_rate?"),
        ("seed: 1\nseed: 2", "'seed' is given twice"),
        ("seed: '1'", "seed is '1'; expected an integer"),
        ("seed: true", "seed is True; expected"),
        ("seed: 1.0", "seed is 1.0; expected"),
        ("seed: null", "seed is None; expected an integer from 0 to 4294967295"),
        ("seed: [1]", r"seed is [1]; expected"),
        ("epochs: 0", "epochs is 0; expected an integer from 1 to 100000 or null"),
        ("progress: 1", "progress is 1; expected"),
        ("tf32: maybe", "tf32 is 'maybe'; expected true or false"),
        ("compile: inductor", "compile is 'inductor'; expected true or false"),
        ("channels_last: null", "channels_last is None; expected true or false"),
        ("routing: 3", "routing is 3; expected one of attention, dynamic, uniform"),
        ("split: false", "split is False; expected"),
        ("learning_rate: .nan", "learning_rate is nan; expected"),
        ("learning_rate: .inf", "learning_rate is inf; expected"),
        ("learning_rate: fast", "learning_rate is 'fast'; expected a number"),
        ("out: 2024", "out is 2024; expected a path"),
        ("out: ''", "out is ''; expected"),
        ('out: "a\\Nb"', "out is 'a\\x85b'; expected a path without control characters"),
        ('out: "a\\0b"', "out is 'a\\x00b'; expected"),
        ("1: 2", "unknown setting 1"),
        ("threshold: 1.2", "threshold is 1.2; expected numbers from -1000000000 to 1000000000 for names (NAME=X"),
        ("threshold: {}", "threshold is {}; expected"),
        ("threshold: {5: 50}", "threshold is {5: 50}; expected"),
        ("threshold: {IVSd: thick}", "threshold is {'IVSd': 'thick'}; expected"),
        ("threshold: {IVSd: 1.2, IVSd: 1.3}", "'IVSd' is given twice"),
        ("group_column: [a]", "group_column is ['a']; expected text of 1 to 100 characters"),
        ("group_column: " + "x" * 101, "; expected text of 1 to 100 characters"),
        ("data: ~nobody-of-this-name/x", "data is '~nobody-of-this-name/x'; expected"),
        ("learning_rate: '" + "9" * 60_000 + "x'", "learning_rate is '99"),
        ('"\\e[31m": 1', r"unknown setting '\x1b[31m'"),
        ("\u202eseed: [", "is not valid YAML: "),
        ("[seed, 1]", "must hold lines of the form"),
        ("seed", "must hold lines of the form"),
        ("seed: [", "is not valid YAML"),
        ("a: 1\n---\nb: 2", "is not valid YAML"),
        ("seed: !!python/object/apply:os.getpid []", "is not valid YAML"),
        ("seed: !!bool perhaps", "is not valid YAML"),
        ("seed: !!timestamp never", "is not valid YAML"),
        ("seed: \x07", "is not valid YAML"),
        ("seed: " + "9" * 5000, "is not valid YAML"),
        ("seed: " + "[" * 1500, "is nested too deeply"),
        (
            "protocol: paper\nsplit: column",
            "split is 'column'; expected auto, because protocol",
        ),
    ],
)
def test_a_mistake_in_the_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        from_command_line(["--config", str(_file(tmp_path, text))])
    assert message in str(error.value)
    assert str(error.value).isprintable() and len(str(error.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        "0,SMITH,LVIDd,4.5\n1,SMITH,IVSd,1\n",
        "0,SMITH: [\n",
        "'SMITH\n",
        "- SMITH\n",
        "seed: {SMITH, JOHN: [}",
        "@SMITH",
    ],
)
def test_a_table_taken_for_a_configuration_is_not_shown(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read_yaml(_file(tmp_path, text))
    assert "SMITH" not in str(error.value)


def test_a_file_of_any_name_is_named_without_its_codes(tmp_path: Path) -> None:
    for text in ("seed: -1", "sed: 1", "seed: [", "[1]", None):
        path = tmp_path / "\x1b]0;title\x07\n.yaml"
        path.unlink(missing_ok=True)
        if text:
            path.write_text(text)
        with pytest.raises(ConfigError) as error:
            read_yaml(path)
        assert str(error.value).isprintable() and r"\x1b]0;title\x07\n.yaml" in str(error.value)


def test_thresholds_are_given_one_by_one(tmp_path: Path) -> None:
    assert from_command_line([]).threshold is None
    config = from_command_line(["--threshold", "LVIDd=6", "--threshold", "IVSd=1.2"])
    assert config.threshold == {"IVSd": 1.2, "LVIDd": 6.0}
    file = _file(tmp_path, "threshold:\n  IVSd: 1.3\n  RVDd: 1e2\n")
    assert from_command_line(["--config", str(file)]).threshold == {"IVSd": 1.3, "RVDd": 100.0}
    config = from_command_line(["--config", str(file), "--threshold", "IVSd=1.2"])
    assert config.threshold == {"IVSd": 1.2, "RVDd": 100.0}
    assert read_yaml(_file(tmp_path, config.to_yaml()))["threshold"] == config.threshold
    assert TrainConfig(**config.as_dict()) == config  # type: ignore[arg-type]
    assert from_command_line(["--threshold", "a=b=-3"]).threshold == {"a=b": -3.0}  # a column may be called so


def test_the_phantom_has_one_layout() -> None:
    assert TrainConfig(dataset="echonet-lvh").data is None
    with pytest.raises(ConfigError, match=r"dataset is 'echonet-dynamic'; expected auto or echonet-lvh, because with"):
        TrainConfig(dataset="echonet-dynamic")


def test_a_run_of_before_the_data_sets_is_of_echonet_lvh(tmp_path: Path) -> None:
    _run(tmp_path / "run", "--data", str(tmp_path))
    file = tmp_path / "run" / "config.yaml"
    lines = [line for line in file.read_text().splitlines(keepends=True) if not line.startswith("dataset: ")]
    assert file.read_text() != "".join(lines)
    file.write_text("".join(lines))
    assert from_command_line(["--resume", str(tmp_path / "run")]).dataset == "echonet-lvh"


def test_a_resumed_run_keeps_its_thresholds(tmp_path: Path) -> None:
    _run(tmp_path / "run", "--threshold", "IVSd=1.2", "--threshold", "LVIDd=6")
    again = from_command_line(["--resume", str(tmp_path / "run"), "--threshold", "IVSd=1.2"])
    assert again.threshold == {"IVSd": 1.2, "LVIDd": 6.0}
    with pytest.raises(ConfigError, match=r"threshold is \{'IVSd': 1.3, .*, was \{'IVSd': 1.2, "):
        from_command_line(["--resume", str(tmp_path / "run"), "--threshold", "IVSd=1.3"])


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    read = read_yaml(_file(tmp_path, "data: ~/echo\nout: '~'\ncache_dir: a/~/b\n"))
    assert read == {"data": tmp_path / "echo", "out": tmp_path, "cache_dir": Path("a/~/b")}
    config = from_command_line(["--config=~/run.yaml", "--data=~/there", "--out", "./~"])
    assert (config.data, config.out) == (tmp_path / "there", Path("~"))
    # The record of the run keeps the meaning, also for a reader with another home folder.
    monkeypatch.setenv("HOME", "/elsewhere")
    again = read_yaml(_file(tmp_path, config.to_yaml()))
    assert (again["data"], again["out"]) == (tmp_path / "there", Path("~"))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*missing\.yaml: No such file"):
        read_yaml(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match=r"cannot read .*: Is a directory"):
        read_yaml(tmp_path)
    (tmp_path / "latin").write_bytes(b"out: \xff\xfe")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        read_yaml(tmp_path / "latin")


def test_numbers_in_the_file(tmp_path: Path) -> None:
    text = "learning_rate: 1e-4\nregression_weight: '5e-2'\nmax_bad_share: 0\nprecision: 32\nepochs:\n"
    read = read_yaml(_file(tmp_path, text))
    assert read == {
        "learning_rate": 1e-4,
        "regression_weight": 0.05,
        "max_bad_share": 0.0,
        "precision": "32",
        "epochs": None,
    }
    assert read_yaml(_file(tmp_path, "# nothing\n")) == {}


_names = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=20)


@given(out=_names.filter(str.strip), rate=st.floats(1e-9, 1), share=st.floats(0, 1), overwrite=st.booleans())
@settings(max_examples=100, deadline=None)
def test_yaml_round_trip(out: str, rate: float, share: float, overwrite: bool, tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    config = TrainConfig(out=Path(out), learning_rate=rate, max_bad_share=share, overwrite=overwrite)
    for whole in (config, config.resolved()):
        path = _file(tmp_path_factory.getbasetemp(), whole.to_yaml())
        assert TrainConfig(**read_yaml(path)) == whole
        assert TrainConfig(**whole.as_dict()) == whole  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["1e5", "010", "yes", "null", "~", "2024-01-01", "1:30", "a: b", "#x", ".5"])
def test_names_that_look_like_something_else_survive(name: str, tmp_path: Path) -> None:
    config = TrainConfig(out=Path(name))
    assert read_yaml(_file(tmp_path, config.to_yaml()))["out"] == Path(name)


@given(text=st.text(st.sampled_from("seed: [{&*!|>'\"#-?%@\n\t0aé.,]}"), max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_file_is_read_or_refused_by_name(text: str, tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    try:
        read = read_yaml(_file(tmp_path_factory.getbasetemp(), text))
    except ConfigError:
        return
    assert set(read) <= set(options())


def test_values_are_checked_wherever_a_configuration_is_made() -> None:
    assert TrainConfig(data="here").data == Path("here")  # type: ignore[arg-type]
    for wrong in (
        {"seed": -1},
        {"seed": "3"},
        {"routing": "em"},
        {"progress": 1},
        {"learning_rate": float("nan")},
    ):
        (name,) = wrong
        with pytest.raises(ConfigError, match=rf"^{name} is "):
            TrainConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^seed is "):
        replace(TrainConfig(), seed=2**32)


def _run(folder: Path, *argv: str) -> TrainConfig:
    config = from_command_line(["--out", str(folder), *argv])
    folder.mkdir()
    (folder / "config.yaml").write_text(config.to_yaml())
    return config


def test_a_resumed_run_keeps_its_own_settings(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    old = _run(folder, "--preset", "small", "--seed", "3", "--routing", "dynamic", "--overwrite")
    new = from_command_line(["--resume", str(folder), "--epochs", "60", "--workers", "2", "--no-progress"])
    assert (new.epochs, new.workers, new.progress, new.resume, new.out) == (60, 2, False, folder, folder)
    assert not new.overwrite
    assert replace(new, epochs=old.epochs, workers=0, progress=True, resume=None, overwrite=True) == old
    again = from_command_line(["--resume", str(folder), "--preset", "small", "--out", f"{folder}/."])
    assert again.epochs == 40


def test_a_run_that_was_resumed_can_be_resumed_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    _run(folder)
    once = from_command_line(["--resume", str(folder), "--epochs", "30"])
    (folder / "config.yaml").write_text(once.to_yaml())
    moved = folder.rename(tmp_path / "moved")
    assert from_command_line(["--resume", str(moved)]).epochs == 30


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seed", "4"], r"seed is 4, was 10"),
        (
            ["--preset", "paper", "--routing", "uniform"],
            r"preset is 'paper', was 'tiny'; routing is 'uniform'",
        ),
        (["--overwrite"], "overwrite is true; expected false"),
        (["--out", "elsewhere"], "out is 'elsewhere'; expected the resumed run's folder"),
    ],
)
def test_a_run_cannot_be_resumed_with_other_settings(argv: list[str], message: str, tmp_path: Path) -> None:
    _run(tmp_path / "run")
    with pytest.raises(ConfigError, match=message):
        from_command_line(["--resume", str(tmp_path / "run"), *argv])


def test_a_run_of_an_older_version_keeps_what_it_ran_with(tmp_path: Path) -> None:
    _run(tmp_path / "run")
    file = tmp_path / "run" / "config.yaml"
    newer = ("tf32: ", "channels_last: ", "compile: ")
    lines = [line for line in file.read_text().splitlines(keepends=True) if not line.startswith(newer)]
    file.write_text("".join(lines))
    config = from_command_line(["--resume", str(tmp_path / "run")])
    assert (config.tf32, config.channels_last, config.compile) == (False, False, False)
    file.write_text("".join(lines[:-1]))
    with pytest.raises(ConfigError, match="it has no bootstrap"):
        from_command_line(["--resume", str(tmp_path / "run")])


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        from_command_line(["--resume", str(tmp_path)])


def test_check_resumable_compares_all_settings_except_those_that_may_differ() -> None:
    config = TrainConfig().resolved()
    check_resumable(TrainConfig(), config)
    check_resumable(config, replace(config, epochs=99, device="cpu", threads=2, workers=1, progress=False))
    free = settings_that_affect("length", "rounding", "machine", "display", "place")
    for name in sorted(set(options()) - set(free)):
        model = {"model": "em-capsnet"} if name == "renormalise" else {}
        other = replace(config, **model, **{name: _another(options()[name], getattr(config, name))})
        with pytest.raises(ConfigError, match=rf"[(;] ?{name} is "):
            check_resumable(config, other)


def test_the_parser_itself_takes_no_abbreviation() -> None:
    assert command_line().allow_abbrev is False
    assert vars(command_line().parse_args(["--seed", "3"])) == {"config": None, "seed": 3}


def test_what_a_setting_affects() -> None:
    """The shape is written to every checkpoint, and the rest decides what a resumed run may change."""
    assert settings_that_affect("shape") == (
        "model",
        "form",
        "routing",
        "affine",
        "iterations",
        "renormalise",
        "primary_layout",
        "regression_target",
    )
    assert set(settings_that_affect("place")) == {"out", "overwrite", "resume"}
    assert {"seed", "precision", "tf32", "bootstrap"} <= set(settings_that_affect("result"))


def test_the_paper_protocol_takes_the_first_50_frames() -> None:
    assert TrainConfig(protocol="paper").resolved().frames_per_clip == 50
    assert TrainConfig(protocol="paper", preset="small", frames_per_clip=7).resolved().frames_per_clip == 7
    assert TrainConfig().resolved().frames_per_clip == PRESETS["tiny"].frames_per_clip


def test_renormalise_is_a_setting_of_em_capsnet_alone() -> None:
    TrainConfig(model="em-capsnet", renormalise=True)
    with pytest.raises(ConfigError, match="renormalise is True; expected False, because only model em-capsnet has"):
        TrainConfig(model="vit", renormalise=True)
    assert str(TrainConfig(form="published").resolved().out) == "runs/tiny-attention-published-seed10"
