import json

import pytest

from nuclei3d import console


def test_json_goes_to_stdout_and_words_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    console.emit_json({"a": 1})
    console.say("a [word] for the reader")
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"a": 1}
    assert captured.err == "a [word] for the reader\n"


def test_a_log_file_gets_lines_with_the_time_left(capsys, monkeypatch):
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(clock)))
    with console.progress_bar("train", total=10) as bar:
        bar.note("loss 0.5")
        for _ in range(4):
            bar.advance()
    # 20 s a step, a line at most every 30 s: after the second and the fourth step
    assert capsys.readouterr().err == (
        "train: 2/10, about 0:02:40 left loss 0.5\ntrain: 4/10, about 0:02:00 left loss 0.5\n"
    )


def test_the_time_left_does_not_count_what_was_done_before(capsys, monkeypatch):
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(clock)))
    with console.progress_bar("train", total=10) as bar:
        bar.skip(6)
        bar.advance()
        bar.advance()
    assert capsys.readouterr().err == "train: 8/10, about 0:00:40 left\n"
