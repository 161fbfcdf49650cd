import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import tifffile
import yaml

from nuclei3d.config import Params
from nuclei3d.config.loading import validate_params
from nuclei3d.errors import InputError
from nuclei3d.images.embryos import find_embryos
from nuclei3d.images.frames import find_frames
from nuclei3d.stages.simulate import RECORD, simulate


def small(**simulate: object) -> Params:
    section = {"embryos": ["one", "two"], "frames": [2, 1], "shape": [8, 48, 48], "nuclei": 4, **simulate}
    return validate_params({"seed": 7, "simulate": section}, "the test")


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.md5(p.read_bytes()).hexdigest() for p in files}


def test_the_data_set_has_the_layout_that_the_pipeline_reads(tmp_path: Path) -> None:
    result = simulate(small(), tmp_path / "data")
    embryos = find_embryos(tmp_path / "data")
    assert {e.name: len(e.frames) for e in embryos} == {"one": 2, "two": 1}
    for embryo, made in zip(embryos, result.embryos, strict=True):
        for frame, count in zip(embryo.frames, made.nuclei, strict=True):
            assert frame.label_path is not None
            image, labels = tifffile.imread(frame.image_path), tifffile.imread(frame.label_path)
            assert image.shape == labels.shape == (8, 48, 48)
            assert labels.max() == count


def test_files_carry_the_voxel_size(tmp_path: Path) -> None:
    simulate(small(voxel_size_um=[3.0, 0.5, 0.25]), tmp_path / "data")
    for kind in ("images", "labels"):
        for frame in find_frames(tmp_path / "data" / "one" / kind):
            assert frame.require_voxel_size().zyx == pytest.approx((3.0, 0.5, 0.25))


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    simulate(small(), tmp_path / "a")
    simulate(small(), tmp_path / "b")
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    # images, labels, tracks; the tables of tracks; the record and the list of all these
    assert len(digests(tmp_path / "a")) == 3 * 3 + 2 + 2


def test_an_embryo_does_not_depend_on_those_after_it(tmp_path: Path) -> None:
    simulate(small(), tmp_path / "both")
    simulate(small(embryos=["one"], frames=2), tmp_path / "alone")
    assert digests(tmp_path / "both" / "one") == digests(tmp_path / "alone" / "one")


def test_the_record_says_how_the_embryos_were_made(tmp_path: Path) -> None:
    params = small()
    result = simulate(params, tmp_path / "data")
    record = json.loads((tmp_path / "data" / RECORD).read_text())
    again = validate_params({"seed": record["seed"], "simulate": record["simulate"]}, "the record")
    assert again.simulate == params.simulate
    assert again.seed == params.seed
    assert record["embryos"] == json.loads(json.dumps(asdict(result)["embryos"]))


def test_an_earlier_simulation_is_replaced_as_a_whole(tmp_path: Path) -> None:
    out = tmp_path / "data"
    simulate(small(embryos=["old"], frames=1), out)
    simulate(small(embryos=["new"], frames=1), out)
    assert sorted(path.name for path in out.iterdir()) == [".written.json", "new", RECORD]


def test_labels_and_embryos_that_came_later_are_not_lost(tmp_path: Path) -> None:
    out = tmp_path / "data"
    simulate(small(embryos=["old"], frames=1), out)
    (labels,) = (out / "old" / "labels").iterdir()
    corrected = labels.read_bytes() + b"corrected"
    labels.write_bytes(corrected)
    # as a copy with its dates does
    os.utime(labels, (0, 0))
    with pytest.raises(InputError, match=rf"{labels.name} in it was changed since it was written"):
        simulate(small(), out)
    (out / "old" / "labels" / "mine.txt").touch()
    with pytest.raises(InputError, match=r"mine\.txt in it did not come with this earlier simulation"):
        simulate(small(), out)
    assert labels.read_bytes() == corrected


def test_a_copy_of_a_simulation_is_one(tmp_path: Path) -> None:
    simulate(small(embryos=["old"], frames=1), tmp_path / "data")
    shutil.copytree(tmp_path / "data", tmp_path / "copy", copy_function=shutil.copyfile)
    (tmp_path / "copy" / "old" / ".DS_Store").touch()
    simulate(small(embryos=["new"], frames=1), tmp_path / "copy")


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match=r"exists and is no earlier simulation"):
        simulate(small(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    with pytest.raises(InputError, match="data"):
        simulate(small(), tmp_path / "data")


def test_nothing_stays_behind_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise InputError("no space left")

    monkeypatch.setattr("nuclei3d.stages.simulate.write_labels", full_disk)
    with pytest.raises(InputError, match="no space"):
        simulate(small(), tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


REPOSITORY = Path(__file__).parents[2]


def sample_listing() -> list[dict[str, str]]:
    """The files of the sample as data.dvc and the remote in the repository name them."""
    pointer = yaml.safe_load((REPOSITORY / "data.dvc").read_text())
    digest = pointer["outs"][0]["md5"]
    listing: list[dict[str, str]] = json.loads(stored(digest).read_text())
    return listing


def stored(digest: str) -> Path:
    return REPOSITORY / "dvcstore" / "files" / "md5" / digest[:2] / digest[2:]


def test_the_sample_lies_whole_in_the_repository() -> None:
    listing = sample_listing()
    # images, labels and tracks, three tables of tracks, the record and the list of all these
    assert len(listing) == 3 * 12 + 3 + 2
    for entry in listing:
        assert hashlib.md5(stored(entry["md5"]).read_bytes()).hexdigest() == entry["md5"]
    assert sum(stored(entry["md5"]).stat().st_size for entry in listing) < 5e6


def test_the_sample_was_made_with_the_defaults() -> None:
    (record,) = [entry for entry in sample_listing() if entry["relpath"] == RECORD]
    made = json.loads(stored(record["md5"]).read_text())
    assert validate_params({"seed": made["seed"], "simulate": made["simulate"]}, "the record") == Params()
