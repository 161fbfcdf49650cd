"""Lineage says the truth about commit, changes and inputs."""

import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from nuclei3d.config import Params
from nuclei3d.digests import digest_of
from nuclei3d.experiment.provenance import UNKNOWN, git_state, md5_of_input, trace_provenance


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_text("a = 1\n")
    (tmp_path / "dvc.lock").write_text("one\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def test_a_clean_checkout_is_clean(repository: Path) -> None:
    assert git_state(repository) == (git(repository, "rev-parse", "HEAD"), False)


def test_the_lock_that_dvc_is_writing_does_not_count_as_a_change(repository: Path) -> None:
    (repository / "dvc.lock").write_text("two\n")
    (repository / "notes.txt").write_text("not tracked, no source")
    assert git_state(repository)[1] is False


@pytest.mark.parametrize("file", ["src/a.py", "src/new.py"])
def test_a_changed_or_new_source_counts(repository: Path, file: str) -> None:
    (repository / file).write_text("b = 2\n")
    assert git_state(repository)[1] is True
    assert git_state(repository / "src")[1] is True


def test_without_a_repository_the_commit_is_unknown(tmp_path: Path) -> None:
    assert git_state(tmp_path) == (UNKNOWN, False)


def test_md5_of_a_file_is_the_usual_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert md5_of_input(tmp_path / "a") == hashlib.md5(b"abc").hexdigest()


def test_md5_of_slices_is_that_of_their_summary(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"md5": "feed"}))
    assert md5_of_input(tmp_path) == "feed"


def test_md5_of_a_folder_sees_names_and_contents(tmp_path: Path) -> None:
    def md5_with(files: dict[str, str], name: str) -> str:
        folder = tmp_path / name
        for file, text in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text)
        return md5_of_input(folder)

    first = md5_with({"a": "1", "b/c": "2"}, "one")
    assert md5_with({"b/c": "2", "a": "1"}, "two") == first
    assert md5_with({"a": "1", "b/d": "2"}, "three") != first
    assert md5_with({"a": "1", "b/c": "3"}, "four") != first
    assert md5_of_input(tmp_path / "absent") == UNKNOWN


def test_data_that_changed_without_dvc_add_are_traced_as_they_are(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    data, slices = Path("data"), Path("slices")
    data.mkdir()
    (data / "t0.tif").write_text("labels")
    slices.mkdir()
    (slices / "summary.json").write_text(json.dumps({"md5": "feed", "data": "data"}))
    Path("data.dvc").write_text(f"outs:\n- md5: {digest_of(data)}\n  hash: md5\n  path: data\n")
    git(repository, "add", "data.dvc")
    git(repository, "commit", "-qm", "data")
    for inputs in ({"data": data}, {"slices": slices}):
        known = trace_provenance(Params(), inputs)
        assert known.input_md5["data"] == digest_of(data)
        assert not known.git_dirty
    (data / "t0.tif").write_text("labelS")
    for inputs in ({"data": data}, {"slices": slices}):
        changed = trace_provenance(Params(), inputs)
        assert changed.input_md5["data"] == digest_of(data) != known.input_md5["data"]
        assert changed.git_dirty
    (data / "t0.tif").unlink()
    data.rmdir()
    assert md5_of_input(data) == known.input_md5["data"], "not pulled yet"
