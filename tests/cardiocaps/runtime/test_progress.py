import pytest

from cardiocaps.runtime import progress


def ticking(monkeypatch: pytest.MonkeyPatch, step: float) -> None:
    """Each look at the clock finds so many seconds gone."""
    clock = iter(range(10**6))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock) * step)


class Terminal:
    """A stream that is one."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch, kind: str) -> Terminal:
    """No fixture: pytest takes standard error back when the test begins."""
    stream = Terminal()
    monkeypatch.setenv("TERM", kind)
    monkeypatch.setattr(progress.sys, "stderr", stream)
    return stream


def test_without_a_terminal_a_line_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ticking(monkeypatch, 3)
    assert list(progress.shown(iter(range(10)), 10, "decoding videos")) == list(range(10))
    # The clock is looked at once for each result, and once more after a line.
    assert capsys.readouterr() == ("", "decoding videos: 4 of 10\ndecoding videos: 8 of 10\n")
    ticking(monkeypatch, 0.5)
    assert list(progress.shown(iter("abc"), 3, "decoding videos")) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_a_bar_after_two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch, "xterm")
    assert list(progress.shown(iter("abc"), 3, "decoding videos")) == ["a", "b", "c"]
    assert terminal.text == ""
    ticking(monkeypatch, 3)
    assert list(progress.shown(iter("abc"), 3, "decoding videos")) == ["a", "b", "c"]
    assert "decoding videos" in terminal.text and "3/3" in terminal.text


def test_a_terminal_that_shows_no_bar_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch, "dumb")
    ticking(monkeypatch, 11)
    assert list(progress.shown(iter("ab"), 2, "decoding videos")) == ["a", "b"]
    assert terminal.text == "decoding videos: 1 of 2\ndecoding videos: 2 of 2\n"


def test_nobody_to_tell_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.sys, "stderr", None)
    assert list(progress.shown(iter("abc"), 3, "decoding videos")) == ["a", "b", "c"]
