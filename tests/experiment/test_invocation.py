"""A request is refused for what is wrong with it, and reads nothing that it must not."""

import base64
import io
import struct
from pathlib import Path

import numpy as np
import pytest
import tifffile

from nuclei3d.config.sections import PredictParams
from nuclei3d.errors import InputError
from nuclei3d.experiment.invocation import (
    RequestParams,
    VolumeLimits,
    decode_volume,
    open_frame,
    path_below,
    read_request_params,
    refuse_second_model,
    volume_on_disk,
)
from nuclei3d.experiment.packing import request_signature
from nuclei3d.images.tiff import write_image
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.folder import ModelInfo
from nuclei3d.segmentation.settings import segmentation_settings


def tiff_bytes(shape: tuple[int, ...] = (3, 4, 5)) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, np.arange(np.prod(shape), dtype=np.uint16).reshape(shape))
    return file.getvalue()


def huge_tiff(width: int, height: int) -> bytes:
    """A TIFF of some hundred bytes whose one page declares width x height pixels."""
    entries = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8)]
    entries += [(277, 3, 1), (278, 4, height), (279, 4, 8)]
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return b"II*\0" + struct.pack("<I", 16) + bytes(8) + directory + bytes(4)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"mod": "ortho"}, "did you mean 'mode'"),
        ({"diametre_um": 5}, "did you mean 'diameter_um'"),
        ({"brightness": "x"}, "known: "),
        ({"mode": "magic"}, "'mode' is 'magic'"),
        ({"mode": "mixed"}, "'mode' is 'mixed'"),
        ({"diameter_um": "auto"}, "'diameter_um' is 'auto'"),
        ({"min_volume_um3": -1}, "'min_volume_um3' is -1"),
        ({"voxel_size_um": [1, 2]}, "voxel_size_um"),
        ({"cellprob_threshold": float("nan")}, "cellprob_threshold"),
    ],
)
def test_unknown_misspelt_or_wrong_parameters_are_refused(given: dict[str, object], told: str) -> None:
    with pytest.raises(InputError, match=told):
        read_request_params(given)


def test_what_a_request_does_not_say_comes_from_the_defaults() -> None:
    defaults = PredictParams(mode="stitch", min_volume_um3=7.0, flip_average=True)
    wishes = read_request_params({"mode": None, "channel": "", "voxel_size_um": [], "flip_average": False})
    assert wishes.over(defaults) == PredictParams(mode="stitch", min_volume_um3=7.0, flip_average=False)


def test_a_request_may_set_all_of_the_prediction_but_where_it_is_computed() -> None:
    machine = {"device", "engine", "memory_gb", "workers", "scheduler"}
    files = {"report", "animation", "into_input"}
    # one service, one model
    second = {"orthogonal_model", "volume_model", "volume_weight"}
    assert set(PredictParams.model_fields) - set(RequestParams.model_fields) == machine | files | second
    own = set(RequestParams.model_fields) - set(PredictParams.model_fields)
    assert own == {"voxel_size_um", "anisotropy", "channel"}


def test_parameters_that_do_not_go_together_are_refused() -> None:
    wishes = read_request_params({"view_weights": [1, 2]})
    assert wishes.over(PredictParams(views=("xy", "xz"))).view_weights == (1.0, 2.0)
    with pytest.raises(InputError, match="2 numbers for 3 views"):
        wishes.over(PredictParams())
    with pytest.raises(InputError, match="'views"):
        read_request_params({"views": ["zz"]})


@pytest.mark.parametrize("name", ["orthogonal_model", "volume_model"])
def test_a_second_model_is_refused_and_not_ignored(name: str) -> None:
    refuse_second_model(PredictParams())
    with pytest.raises(InputError, match=rf"predict\.{name} is for .* leave it out"):
        refuse_second_model(PredictParams(**{name: Path("other")}))


def test_the_signature_has_all_parameters_of_a_request() -> None:
    signature = request_signature(ModelInfo(diameter_px=17, nucleus_diameter_um=9.5), PredictParams())
    defaults = {spec.name: spec.default for spec in signature.params}
    assert set(defaults) == set(RequestParams.model_fields)
    assert defaults["diameter_um"] == 9.5
    assert read_request_params(defaults).mode == PredictParams().mode == "auto"


def test_the_least_volume_of_the_model_follows_the_diameter_of_a_request() -> None:
    info = ModelInfo(diameter_px=17, nucleus_diameter_um=10, min_volume_um3=80)
    sent = {spec.name: spec.default for spec in request_signature(info, PredictParams()).params}
    for diameter_um, least_um3 in ((10, 80), (5, 10)):
        asked = read_request_params(sent | {"diameter_um": diameter_um}).over(PredictParams())
        assert segmentation_settings(info, asked).masks.min_volume_um3 == least_um3


def test_a_diameter_to_be_estimated_is_not_for_a_service() -> None:
    with pytest.raises(InputError, match="registered models and services take a number"):
        refuse_second_model(PredictParams(diameter_um="auto"))


def test_a_volume_may_come_as_bytes_or_base64() -> None:
    content = tiff_bytes()
    assert decode_volume(content) == content
    assert decode_volume(base64.b64encode(content).decode()) == content


@pytest.mark.parametrize("value", ["%%%", base64.b64encode(b"PK\3\4 a zip").decode(), 7, [1, 2]])
def test_what_is_no_tiff_is_refused(value: object) -> None:
    with pytest.raises(InputError, match="TIFF"):
        decode_volume(value)


@pytest.mark.parametrize("row", [{}, {"volume": None, "path": float("nan")}, {"volume": b"a", "path": "b"}])
def test_a_row_has_either_a_volume_or_a_path(row: dict[str, object]) -> None:
    with pytest.raises(InputError, match="either"), volume_on_disk(row, VolumeLimits()):
        pass


def test_a_path_below_the_root_is_found(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.tif").write_bytes(b"")
    assert path_below(tmp_path, "a/b.tif") == tmp_path / "a" / "b.tif"
    assert path_below(tmp_path, str(tmp_path / "a" / "b.tif")) == tmp_path / "a" / "b.tif"


@pytest.mark.parametrize(
    "path",
    ["../secret.tif", "a/../../secret.tif", "/etc/hostname", "link.tif", "linked/secret.tif", "a\0b", ""],
)
def test_no_path_leaves_the_root(tmp_path: Path, path: str) -> None:
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (tmp_path / "secret.tif").write_bytes(tiff_bytes())
    (root / "link.tif").symlink_to(tmp_path / "secret.tif")
    (root / "linked").symlink_to(tmp_path)
    with pytest.raises(InputError):
        path_below(root, path)


@pytest.mark.parametrize("path", ["http://localhost/a.tif", "file:///etc/hostname", "s3://bucket/a.tif"])
def test_addresses_are_no_paths(tmp_path: Path, path: str) -> None:
    with pytest.raises(InputError, match="below the root"):
        path_below(tmp_path, path)


def test_a_folder_with_links_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "a.zarr" / "0").symlink_to("/etc")
    with pytest.raises(InputError, match="links"):
        path_below(tmp_path, "a.zarr")


def test_without_a_root_no_path_is_taken() -> None:
    with pytest.raises(InputError, match="takes no paths"):
        path_below(None, "a.tif")


def test_a_header_that_claims_10_to_the_12_voxels_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    file = tmp_path / "huge.tif"
    file.write_bytes(huge_tiff(1_000_000, 1_000_000))
    with pytest.raises(InputError, match="claims 1000000000000 bytes of voxels"):
        open_frame(file, RequestParams(), 10**9)


def test_a_damaged_header_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "cut.tif"
    file.write_bytes(tiff_bytes()[:12])
    with pytest.raises(InputError):
        open_frame(file, RequestParams(), 10**9)


def test_the_voxel_size_is_that_of_the_file_unless_the_request_says_otherwise(tmp_path: Path) -> None:
    file = tmp_path / "a.ome.tif"
    write_image(file, np.zeros((3, 4, 5), np.uint16), VoxelSize(2.0, 0.5, 0.5))
    plain = tmp_path / "plain.tif"
    plain.write_bytes(tiff_bytes((6, 7, 8)))
    assert open_frame(file, RequestParams(), 100)[1] == VoxelSize(2.0, 0.5, 0.5)
    assert open_frame(file, RequestParams(anisotropy=3), 100)[1] == VoxelSize(1.5, 0.5, 0.5)
    assert open_frame(file, RequestParams(voxel_size_um=(1, 1, 1)), 100)[1] == VoxelSize(1, 1, 1)
    both = RequestParams(voxel_size_um=(2, 1, 1), anisotropy=2)
    assert open_frame(file, both, 100)[1] == VoxelSize(2, 1, 1)
    with pytest.raises(InputError, match=r"contradict.*has an anisotropy of 2, anisotropy says 5"):
        open_frame(file, RequestParams(voxel_size_um=(2, 1, 1), anisotropy=5), 100)
    with pytest.raises(InputError, match="voxel_size_um"):
        open_frame(plain, RequestParams(), 10**6)
    with pytest.raises(InputError, match="voxels"):
        open_frame(file, RequestParams(), 59)
