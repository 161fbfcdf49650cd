"""The package's own names: there at once, and the rest of it only when they are used."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import nuclei3d
from nuclei3d.errors import InputError
from nuclei3d.images.tiff import write_image
from nuclei3d.images.voxel_size import VoxelSize


def test_the_door_opens_without_the_house() -> None:
    """No time is measured here: a machine may be busy; what takes time is not imported."""
    heavy = "{'torch', 'numba', 'scipy', 'numpy', 'pydantic', 'mlflow', 'tifffile'}"
    code = f"import sys; from nuclei3d import Segmenter; print(*({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_every_name_of_the_package_is_there() -> None:
    assert all(callable(getattr(nuclei3d, name)) for name in nuclei3d.__all__)
    with pytest.raises(AttributeError, match="segmentation2"):
        _ = nuclei3d.segmentation2  # type: ignore[attr-defined]


def test_a_volume_is_read_with_its_voxel_size(tmp_path: Path) -> None:
    image = np.arange(3 * 8 * 9, dtype=np.uint16).reshape(3, 8, 9)
    write_image(tmp_path / "a.ome.tif", image, VoxelSize(2.0, 0.5, 0.5))
    found, size = nuclei3d.read_volume(tmp_path / "a.ome.tif")
    np.testing.assert_array_equal(found, image)
    assert size == VoxelSize(2.0, 0.5, 0.5)
    assert nuclei3d.read_volume(str(tmp_path / "a.ome.tif"), voxel_size_um=(1, 1, 1))[1].zyx == (1, 1, 1)
    with pytest.raises(InputError, match="does not exist"):
        nuclei3d.read_volume(tmp_path / "b.tif")
