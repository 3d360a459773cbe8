import pytest

from cardiocaps.runtime import progress


def ticking(monkeypatch: pytest.MonkeyPatch, step: float) -> None:
    """Makes each call of the clock return a time `step` seconds later."""
    clock = iter(range(10**6))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock) * step)


class Terminal:
    """A stream that claims to be a terminal."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch, kind: str) -> Terminal:
    """Replaces standard error. (Not a fixture: pytest would undo it when the test begins.)"""
    stream = Terminal()
    monkeypatch.setenv("TERM", kind)
    monkeypatch.setattr(progress.sys, "stderr", stream)
    return stream


def test_without_a_terminal_a_line_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ticking(monkeypatch, 3)
    assert list(progress.shown(iter(range(10)), 10, "decoding videos")) == list(range(10))
    # The clock is called once for each result, and once more after a line.
    assert capsys.readouterr() == ("", "decoding videos: 4 of 10\ndecoding videos: 8 of 10\n")
    ticking(monkeypatch, 0.5)
    assert list(progress.shown(iter("abc"), 3, "decoding videos")) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch, "xterm")
    assert list(progress.shown(iter("abc"), 3, "decoding videos")) == ["a", "b", "c"]
    assert "decoding videos" in terminal.text and "100%" in terminal.text


def test_a_terminal_that_shows_no_bar_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch, "dumb")
    ticking(monkeypatch, 11)
    assert list(progress.shown(iter("ab"), 2, "decoding videos")) == ["a", "b"]
    assert terminal.text == "decoding videos: 1 of 2\ndecoding videos: 2 of 2\n"


def test_without_standard_error_the_results_still_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.sys, "stderr", None)
    assert list(progress.shown(iter("abc"), 3, "decoding videos")) == ["a", "b", "c"]
