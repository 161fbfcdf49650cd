"""A digest tells contents apart, whatever size and times say, and unchanged files are not read again."""

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from nuclei3d import digests
from nuclei3d.digests import digest_of

STORE = Path(__file__).parents[1] / "dvcstore" / "files" / "md5"


@pytest.fixture(autouse=True)
def _own_knowledge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "KNOWN_FILE", tmp_path / "cache" / "digests.db")
    monkeypatch.setattr(digests, "_SETTLED_S", -1e9)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read."""
    names: list[str] = []
    real = digests._read

    def read(file: Path) -> str:
        names.append(file.name)
        return real(file)

    monkeypatch.setattr(digests, "_read", read)
    return names


def test_a_file_has_its_md5(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert digest_of(tmp_path / "a") == hashlib.md5(b"abc").hexdigest()


def test_a_folder_of_links_has_the_digest_that_dvc_gave_its_data(tmp_path: Path) -> None:
    """Built from the listing that DVC keeps of the sample, each file a link into DVC's store."""
    for listing in STORE.glob("*/*.dir"):
        folder = tmp_path / listing.stem
        for entry in json.loads(listing.read_text()):
            file = folder / entry["relpath"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.symlink_to(STORE / entry["md5"][:2] / entry["md5"][2:])
        assert digest_of(folder) == listing.parent.name + listing.name


def test_what_did_not_change_is_not_read_again(tmp_path: Path, reads: list[str]) -> None:
    for name in ("a", "b/c"):
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / name).write_text(name)
    first = digest_of(tmp_path / "f")
    assert sorted(reads) == ["a", "c"]
    assert digest_of(tmp_path / "f") == first
    assert sorted(reads) == ["a", "c"]
    (tmp_path / "f" / "a").write_text("b")
    assert digest_of(tmp_path / "f") != first
    assert sorted(reads) == ["a", "a", "c"]


def test_another_content_of_the_same_size_and_time_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("one")
    first, found = digest_of(file), file.stat()
    time.sleep(0.05)
    file.write_text("two")
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (found.st_size, found.st_mtime_ns)
    assert digest_of(file) == hashlib.md5(b"two").hexdigest() != first


def test_a_file_that_changed_just_now_is_read_again(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "_SETTLED_S", 2.0)
    (tmp_path / "a").write_text("one")
    digest_of(tmp_path / "a")
    digest_of(tmp_path / "a")
    assert reads == ["a", "a"]


def test_links_are_followed_to_their_content(tmp_path: Path) -> None:
    for name in ("embryo", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "t0.tif").write_text(name)
    folder = tmp_path / "links"
    folder.mkdir()
    (folder / "a").symlink_to(tmp_path / "embryo")
    (folder / "back").symlink_to(folder)
    first = digest_of(folder)
    (tmp_path / "embryo" / "t0.tif").write_text("changed")
    second = digest_of(folder)
    (folder / "a").unlink()
    (folder / "a").symlink_to(tmp_path / "other")
    third = digest_of(folder)
    (folder / "gone").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "pipe")
    assert len({first, second, third, digest_of(folder)}) == 4


def test_some_entries_can_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "image.zarr").mkdir()
    (tmp_path / "image.zarr" / "0").write_text("voxels")
    first = digest_of(tmp_path / "image.zarr", without=("labels",))
    (tmp_path / "image.zarr" / "labels").mkdir()
    (tmp_path / "image.zarr" / "labels" / "0").write_text("masks")
    assert digest_of(tmp_path / "image.zarr", without=("labels",)) == first
    assert digest_of(tmp_path / "image.zarr") != first


@pytest.mark.parametrize("obstacle", ["file", "rubbish"])
def test_without_a_place_to_keep_them_digests_are_right_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, obstacle: str
) -> None:
    (tmp_path / "file").write_text("no folder, no database" * 100)
    known = tmp_path / "file" / "digests.db" if obstacle == "file" else tmp_path / "file"
    monkeypatch.setattr(digests, "KNOWN_FILE", known)
    (tmp_path / "a").write_bytes(b"abc")
    for _ in range(2):
        assert digest_of(tmp_path / "a") == hashlib.md5(b"abc").hexdigest()
