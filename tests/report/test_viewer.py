"""What the viewer unpacks is what was packed."""

import base64
import zlib
from typing import Any

import numpy as np
import pytest
from imagecodecs import jpeg_decode
from numpy.typing import NDArray

from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.report.viewer import ShownVolume, pack_volume, pack_volumes
from nuclei3d.scoring.assessment import assess_volume

SIZE = VoxelSize(2, 0.5, 0.5)


def viewed(name: str, missed: int = 0, shape: tuple[int, int, int] = (5, 40, 48)) -> ShownVolume:
    truth = np.zeros(shape, dtype=np.uint32)
    for label in range(1, 5):
        truth[1:3, 5:15, 10 * label - 8 : 10 * label] = 100 * label
    pred = np.where(truth > 100 * missed, truth, 0).astype(np.uint32)
    ramp = np.linspace(0, 1, shape[2])
    image = np.broadcast_to(1000 * ramp, shape) + 200 * np.arange(shape[0])[:, None, None]
    assessment = assess_volume(truth, pred, SIZE)
    return ShownVolume(name, SIZE, assessment, lambda: (image, truth, pred))


def labels_of(packed: dict[str, Any], side: str) -> NDArray[np.uint16]:
    data = zlib.decompress(base64.b64decode(packed[side]))
    return np.frombuffer(data, dtype="<u2").reshape(packed["shape"])


def test_labels_come_back_in_the_order_of_the_nuclei() -> None:
    volume = viewed("a", missed=1)
    packed = pack_volume(volume)
    _, truth, pred = volume.read()
    np.testing.assert_array_equal(labels_of(packed, "truth") * 100, truth)
    np.testing.assert_array_equal(np.array([0, 200, 300, 400])[labels_of(packed, "pred")], pred)
    assert packed["found"] == [0, 1, 1, 1]
    assert packed["right"] == [1, 1, 1]


def test_planes_come_back_from_the_sprite_as_square_roots() -> None:
    volume = viewed("a")
    packed = pack_volume(volume)
    image, _, _ = volume.read()
    assert image is not None
    depth, height, width = packed["shape"]
    columns = packed["columns"]
    sprite = jpeg_decode(base64.b64decode(packed["image"]))
    low, high = np.percentile(image, (1, 99.8))
    expected = 255 * np.sqrt(np.clip((image - low) / (high - low), 0, 1))
    for z in range(depth):
        row, column = divmod(z, columns)
        plane = sprite[row * height : (row + 1) * height, column * width : (column + 1) * width]
        assert np.abs(plane.astype(float) - expected[z]).mean() < 4


def test_large_volumes_are_thinned_across_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nuclei3d.report.viewer._FRAME_VOXELS", 3000)
    volume = viewed("a", shape=(5, 41, 50))
    packed = pack_volume(volume)
    _, truth, _ = volume.read()
    assert packed["shape"] == [5, 21, 25]
    assert packed["voxel_um"] == [2, 1, 1]
    np.testing.assert_array_equal(labels_of(packed, "truth") * 100, truth[:, ::2, ::2])


def test_the_budget_keeps_the_volumes_with_most_errors_in_their_order() -> None:
    volumes = [viewed("good"), viewed("worst", missed=3), viewed("fine"), viewed("bad", missed=1)]
    size = sum(len(pack_volume(volumes[0])[key]) for key in ("image", "truth", "pred")) / 1e6
    assert [v["name"] for v in pack_volumes(volumes, 100)] == ["good", "worst", "fine", "bad"]
    assert [v["name"] for v in pack_volumes(volumes, 2.5 * size)] == ["worst", "bad"]
    # one is always shown
    assert [v["name"] for v in pack_volumes(volumes, 1e-9)] == ["worst"]


def test_without_an_image_there_is_none() -> None:
    volume = viewed("a")
    _, truth, pred = volume.read()
    bare = ShownVolume("a", SIZE, volume.assessment, lambda: (None, truth, pred))
    assert pack_volume(bare)["image"] is None
