"""export: a model, masks or training planes for Cellpose, bioimage.io and ImageJ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

from nuclei3d.config import Params
from nuclei3d.console import progress_bar, say
from nuclei3d.errors import InputError
from nuclei3d.outputs import whole_folder

if TYPE_CHECKING:
    from nuclei3d.stages.pairing import Entry

Format = Literal["cellpose", "bioimageio", "seg", "rois", "cellpose-training"]
FORMATS: tuple[Format, ...] = get_args(Format)
OF_MODELS: tuple[Format, ...] = ("cellpose", "bioimageio")
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class ExportResult:
    """The folder, which has one for each format, and the files that the other programs open, by format."""

    out: Path
    files: dict[Format, tuple[Path, ...]]


def export(
    params: Params,
    out: Path,
    *,
    model: str | None = None,
    masks: Path | None = None,
    images: Path | None = None,
    slices: Path | None = None,
    formats: Sequence[str] = (),
) -> ExportResult:
    """Write a model, masks or training planes for other programs into a folder that holds nothing yet.

    Formats of models (a folder, weights file or ``models:/name@alias``) are ``cellpose``, weights of a 2D
    network that Cellpose's command line and GUI load, and ``bioimageio``, a package of the network. Formats
    of masks (labels such as ``predict`` writes) are ``rois``, zip files for ImageJ's ROI manager, and with
    their images ``seg``, a folder of images with ``_seg.npy`` that Cellpose's GUI opens. Of slices, made by
    ``prepare``, ``cellpose-training`` makes TIFF pairs with flows for ``python -m cellpose --train``. Without
    formats all that was given decides, and ``bioimageio`` is left out.
    """
    wanted = _choose_formats(formats, model, masks, images, slices)
    from nuclei3d.stages.export import cellpose

    loaded = None
    if model is not None and set(wanted) & set(OF_MODELS):
        from nuclei3d.experiment.registry import find_model
        from nuclei3d.networks.folder import load_model

        loaded = load_model(find_model(model, params))
    if loaded is not None and "cellpose" in wanted and loaded.info.kind != "views2d":
        raise InputError(
            f"the model '{loaded.info.name}' is a 3D network, which Cellpose cannot load; export it with "
            "--format bioimageio"
        )
    if loaded is not None and "cellpose" in wanted and not loaded.info.for_cellpose:
        raise InputError(
            f"the network of '{loaded.info.name}' has width {loaded.info.width} (train.width), and Cellpose "
            "loads width 32 only; export it with --format bioimageio"
        )
    if "bioimageio" in wanted:
        if find_spec("bioimageio") is None or find_spec("bioimageio.spec") is None:
            raise InputError("the format bioimageio needs bioimageio.core: pip install 'nuclei3d[export]'")
        from nuclei3d.stages.export import bioimageio
    entries = _find_masks(masks) if masks is not None and {"seg", "rois"} & set(wanted) else []
    pairs = _find_images(entries, images, params) if images is not None and "seg" in wanted else []
    files: dict[Format, tuple[Path, ...]] = {}
    with whole_folder(out, replace=False) as folder:
        for name in wanted:
            place = folder / name
            place.mkdir()
            if loaded is not None and name in OF_MODELS:
                write = cellpose.write_weights if name == "cellpose" else bioimageio.write_package
                written = [write(loaded, place)]
            elif name == "seg":
                written = _write_seg(pairs, params, place)
            elif slices is not None and name == "cellpose-training":
                written = cellpose.write_training_set(slices, place)
            else:
                written = [
                    cellpose.write_rois(place / f"{entry.key}_rois.zip", entry.read_labels())
                    for entry in _shown(entries)
                ]
            files[name] = tuple(out / path.relative_to(folder) for path in written)
    for name, paths in files.items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        say(f"{name}: {paths[0]}{more}")
    return ExportResult(out, files)


def _choose_formats(
    formats: Sequence[str], model: str | None, masks: Path | None, images: Path | None, slices: Path | None
) -> list[Format]:
    if model is None and masks is None and slices is None:
        raise InputError("nothing to export: give a model (--model), masks (--masks), or slices (--slices)")
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise InputError(f"unknown format '{unknown[0]}'; known: {', '.join(FORMATS)}")
    of_model, of_masks = (
        "is one of models; give --model",
        "is one of masks; give --masks (nuclei3d predict writes them)",
    )
    needs: dict[Format, tuple[object, str]] = {
        "cellpose": (model, of_model),
        "bioimageio": (model, of_model),
        "seg": (masks and images, "holds images with their masks; give --images" if masks else of_masks),
        "rois": (masks, of_masks),
        "cellpose-training": (slices, "holds training planes; give --slices (from nuclei3d prepare)"),
    }
    if not formats:
        return [name for name, (given, _) in needs.items() if given and name != "bioimageio"]
    wanted = [name for name in FORMATS if name in formats]
    for name in wanted:
        given, lacking = needs[name]
        if given is None:
            raise InputError(f"the format {name} {lacking}")
    return wanted


def _find_masks(masks: Path) -> list[Entry]:
    from nuclei3d.stages.pairing import find_label_entries

    entries = find_label_entries(masks)
    names: dict[str, Path] = {}
    for entry in entries:
        other = names.setdefault(entry.key, entry.frame.path)
        if other != entry.frame.path:
            raise InputError(
                f"{other} and {entry.frame.path} would both be exported as {entry.key}; export them into "
                "folders of their own"
            )
    return entries


def _find_images(entries: Sequence[Entry], images: Path, params: Params) -> list[tuple[Entry, Entry]]:
    from nuclei3d.stages.pairing import find_image_entries, pair_entries

    pairs = pair_entries(entries, find_image_entries(images, params.data.channel))
    alone = [entry for entry in entries if entry not in pairs]
    if alone:
        raise InputError(
            f"{alone[0].frame.path} has no image of its name in {images} ({len(alone)} such masks)"
        )
    for first, image in pairs.items():
        if first.frame.shape != image.frame.shape:
            one, other = (" x ".join(map(str, entry.frame.shape)) for entry in (first, image))
            raise InputError(
                f"{first.frame.path} is {one}, its image {image.frame.path} is {other}; "
                "masks and images must lie on one grid"
            )
    return [*pairs.items()]


def _write_seg(pairs: Sequence[tuple[Entry, Entry]], params: Params, folder: Path) -> list[Path]:
    from nuclei3d.images.voxel_size import VoxelSize
    from nuclei3d.stages.export.cellpose import write_seg

    given = VoxelSize.given(params.data.voxel_size_um)
    written = []
    for labels, image in _shown(pairs):
        size = given or image.frame.require_voxel_size()
        written.append(write_seg(folder, labels.key, image.frame.read(), labels.read_labels(), size))
    return written


def _shown(items: Sequence[_Item]) -> Iterator[_Item]:
    with progress_bar("export", total=len(items)) as bar:
        for item in items:
            yield item
            bar.advance(1)
