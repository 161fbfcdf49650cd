"""The layers of docs/architecture.md hold: an arrow only points down."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import nuclei3d

PACKAGE = Path(nuclei3d.__file__).parent
LAYERS = {
    "__version__": 0,
    "errors": 0,
    "console": 0,
    "digests": 0,
    "outputs": 0,
    "views": 0,
    "worker": 1,
    "config": 1,
    "images": 2,
    "grid": 2,
    "intensity": 2,
    "diameter": 3,
    "flows": 3,
    "simulation": 3,
    "networks": 3,
    "scoring": 3,
    "segmentation": 4,
    "training": 5,
    "tracks": 5,
    "experiment": 6,
    "report": 6,
    "client": 7,
    "serve": 7,
    "stages": 8,
    "cli": 9,
    "__main__": 10,
}
ON_ARRAYS = {
    "grid",
    "intensity",
    "diameter",
    "flows",
    "segmentation",
    "training",
    "scoring",
    "simulation",
    "tracks",
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imported_names(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def test_every_room_has_a_layer() -> None:
    rooms = {room_of(path) for path in MODULES} - {"__init__"}
    assert rooms <= set(LAYERS), f"give these a layer in docs/architecture.md and here: {rooms - set(LAYERS)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    for name in imported_names(path):
        parts = name.split(".")
        if parts[0] == "nuclei3d" and len(parts) > 1:
            assert LAYERS[parts[1]] <= LAYERS[room], f"{room} imports {name} from a higher layer"


def test_no_files_import_one_another() -> None:
    """Not even for types alone, or late: what two files share lies in a third."""
    names = {path: ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in MODULES}
    known = set(names.values())
    graph = {names[path]: imported_names(path) & known for path in MODULES}
    TopologicalSorter(graph).prepare()  # a CycleError names the files


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_experiment_imports_mlflow(path: Path) -> None:
    if room_of(path) != "experiment":
        assert not any(name.split(".")[0] == "mlflow" for name in imported_names(path))


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES if room_of(path) in ON_ARRAYS],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_functions_on_arrays_touch_no_files(path: Path) -> None:
    by_libraries = {"pathlib", "tifffile", "zarr", "shutil", "csv", "json"}
    by_us = {"nuclei3d.outputs", "nuclei3d.images.tiff", "nuclei3d.images.frames"}
    if path.name != "segmenter.py":
        by_us.add("nuclei3d.networks.folder.load_model")
    assert not imported_names(path) & (by_libraries | by_us)
