"""A stage is done again exactly when something on which its result depends has changed."""

from pathlib import Path
from typing import Any

import pytest

import nuclei3d
from nuclei3d.stages import run as ledger
from nuclei3d.stages.run import Ledger, fingerprint


class Copy:
    """A stage that copies a file, and counts how often it did."""

    def __init__(self, tmp_path: Path) -> None:
        self.source, self.target = tmp_path / "source", tmp_path / "target"
        self.source.write_text("first")
        self.ledger = Ledger(tmp_path / "done")
        self.times = 0

    def do(self, **settings: Any) -> bool:
        """Whether the stage was done now."""
        entry = self.ledger.do("copy", settings, [self.source], [self.target], self._work)
        assert entry.result == {"size": len(self.source.read_text())}
        assert self.target.read_text() == self.source.read_text()
        return entry.fresh

    def _work(self) -> dict[str, Any]:
        self.times += 1
        self.target.write_text(self.source.read_text())
        return {"size": len(self.source.read_text())}


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


def test_nothing_changed_nothing_done(copy: Copy) -> None:
    assert copy.do(a=1)
    assert not copy.do(a=1)
    assert copy.times == 1


def test_other_settings_inputs_or_outputs_do_it_again(copy: Copy) -> None:
    assert copy.do(a=1)
    assert copy.do(a=2)
    copy.source.write_text("second")
    assert copy.do(a=2)
    copy.target.unlink()
    assert copy.do(a=2)
    copy.target.write_text("tampered with")
    assert copy.do(a=2)
    assert not copy.do(a=2)


def test_another_version_of_the_code_does_it_again(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    assert copy.do()
    copy.ledger = Ledger(copy.ledger._folder)
    assert not copy.do()
    monkeypatch.setattr("nuclei3d.stages.run.code_fingerprint", lambda: "newer")
    copy.ledger = Ledger(copy.ledger._folder)
    assert copy.do()


def test_a_stage_that_failed_is_not_done(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)

    def broken() -> dict[str, Any]:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        ledger.do("stage", {}, [], [], broken)
    assert ledger.do("stage", {}, [], [], dict).fresh


def test_a_damaged_record_means_not_done(copy: Copy) -> None:
    copy.do()
    record = copy.ledger._folder / "copy.json"
    record.write_text(record.read_text()[:20])
    assert copy.do()


def test_a_fingerprint_sees_names_sizes_and_changes(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    assert fingerprint(folder) == "absent"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a").write_text("1")
    first = fingerprint(folder)
    (folder / ".b.partial-1").write_text("what a killed process left")
    assert fingerprint(folder) == first
    (folder / "c").write_text("")
    assert fingerprint(folder) != first


def test_what_is_left_out_of_the_code_s_digest_exists() -> None:
    package = Path(nuclei3d.__file__).parent
    assert all((package / name).exists() for name in ledger._OUTSIDE)
