import numpy as np
import pytest
import torch

from nuclei3d.config.sections import AugmentParams
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.scoring.matching import average_precision, overlap_table
from nuclei3d.segmentation.dynamics import masks_from_field
from nuclei3d.segmentation.flow_field import FlowField
from nuclei3d.segmentation.settings import MaskSettings
from nuclei3d.training.crops import CropGrid, draw_crop
from nuclei3d.training.examples import NO_AUGMENTATION, CropMaker, stream_batches, validation_batches
from nuclei3d.training.samples import quantise_image
from slices_fixture import make_planes
from volumes_fixture import make_volumes

EVERYTHING = AugmentParams(
    dim_share=0.5,
    depth_attenuation=1.0,
    blur_px=1.0,
    noise=0.1,
    low_resolution=0.5,
    brightness_linear=0.3,
    brightness_gamma=0.3,
)
SIZE = VoxelSize(2.0, 1.0, 1.0)
GRID = CropGrid((1, 48, 48), 14.0)


def maker(augment=EVERYTHING, seed=5, **settings):
    return CropMaker(make_planes(), augment, GRID, seed, **settings)


def maker_of(volumes, augment=NO_AUGMENTATION, shape=(20, 40, 40), voxel_size=SIZE, seed=0, **settings):
    return CropMaker(volumes, augment, CropGrid(shape, 12.0, voxel_size, **settings), seed)


def one(maker, index=0, epoch=0, volume=0):
    return maker.make_batch(np.array([volume]), epoch, index)


def joined(batches):
    batches = list(batches)
    return torch.cat([b.images for b in batches]), torch.cat([b.flows for b in batches])


def plane_maker(seed):
    return maker(seed=seed)


def volume_maker(seed):
    augment = AugmentParams(
        dim_share=0.5, noise=0.1, blur_px=1.0, depth_attenuation=0.5, brightness_gamma=0.3
    )
    return maker_of(make_volumes(2), augment, shape=(8, 16, 16), seed=seed, nucleus_centred=0.5)


@pytest.mark.parametrize("make", [plane_maker, volume_maker])
def test_a_crop_depends_on_seed_epoch_and_number_only(make):
    whole = make(5).make_batch(np.array([0, 1, 0, 0]), 2, 5)
    alone = one(make(5), 6, epoch=2, volume=1)
    assert torch.equal(whole.images[1], alone.images[0])
    np.testing.assert_array_equal(whole.labels[1], alone.labels[0])
    assert not torch.equal(whole.images[2], whole.images[3])
    for other in (one(make(5), 6, epoch=3, volume=1), one(make(6), 6, epoch=2, volume=1)):
        assert not torch.equal(other.images[0], alone.images[0])


@pytest.mark.parametrize(
    ("samples", "grid"),
    [(make_planes(9), GRID), (make_volumes(3), CropGrid((8, 16, 16), 12.0, SIZE, nucleus_centred=0.5))],
)
def test_validation_crops_are_the_same_every_time_and_from_all_views_and_volumes(samples, grid):
    first, second = (validation_batches(samples, 6, grid, 4) for _ in range(2))
    assert [len(batch.samples) for batch in first] == [4, 2]
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, second, strict=True))
    drawn = [samples.infos[sample] for batch in first for sample in batch.samples]
    assert {info.view for info in drawn} == {info.view for info in samples.infos}
    assert len({info.file for info in drawn}) == min(6, len(samples))
    values = torch.cat([b.images[:, 0].flatten() for b in first])
    assert -0.2 < float(values.min()) < 0 < float(values.max()) < 1.3


@pytest.mark.parametrize(("workers", "batch_size"), [(1, 5), (3, 4), (2, 12)])
def test_crops_depend_neither_on_workers_nor_on_batches(workers, batch_size):
    def stream(batch_size, workers):
        def order_of(epoch):
            return (np.arange(12) + epoch) % 6

        return joined(stream_batches(maker(), order_of, range(3, 5), batch_size, workers))

    images, flows = stream(batch_size, workers)
    expected_images, expected_flows = stream(12, 1)
    assert len(images) == 2 * 12
    assert torch.equal(images, expected_images)
    assert torch.equal(flows, expected_flows)


def test_a_batch_is_laid_out_for_the_network():
    batch = maker().make_batch(np.arange(4), 0, 0)
    assert batch.images.shape == (4, 2, 48, 48)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert not batch.images[:, 1].any()
    assert np.array_equal(batch.foreground.numpy(), batch.labels > 0)
    lengths = batch.flows.norm(dim=1)
    assert not lengths[~batch.foreground].any()
    assert float(lengths[batch.foreground].median()) == pytest.approx(1, abs=1e-4)


def test_appearance_leaves_labels_and_flows_alone():
    plain = maker(AugmentParams()).make_batch(np.arange(6), 0, 0)
    changed = maker().make_batch(np.arange(6), 0, 0)
    assert np.array_equal(plain.labels, changed.labels)
    assert torch.equal(plain.flows, changed.flows)
    assert not torch.equal(plain.images, changed.images)


def test_weights_follow_the_labels():
    planes = make_planes()
    tables = [np.arange(planes.read(p).labels.max() + 1, dtype=np.float32) + 1 for p in range(len(planes))]
    batch = maker(nucleus_weights=tables).make_batch(np.arange(6), 0, 0)
    assert np.array_equal(batch.weights.numpy(), batch.labels + 1)


def test_no_validation_planes_give_no_batches():
    assert validation_batches(make_planes(0), 6, GRID, 4) == []


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_small_unsigned_images_are_stored_exactly(dtype):
    image = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (20, 20)).astype(dtype)
    stored, step, offset = quantise_image(image)
    np.testing.assert_array_equal(stored * step + offset, image)


@pytest.mark.parametrize("image", [np.linspace(-3, 900, 400).reshape(20, 20), np.full((4, 4), -2.5)])
def test_other_images_are_stored_to_a_65535th_of_their_range(image):
    stored, step, offset = quantise_image(image.astype(np.float32))
    assert stored.dtype == np.uint16
    np.testing.assert_allclose(stored * step + offset, image, atol=np.ptp(image) / 65535 + 1e-4)


def test_an_unchanged_patch_of_the_whole_volume_is_the_volume():
    volumes = make_volumes(1)
    batch = one(maker_of(volumes))
    pixels, labels, flows = volumes.read(0)
    np.testing.assert_allclose(batch.images[0, 0].numpy(), (pixels - 50.0) / 400.0, atol=1e-5)
    np.testing.assert_array_equal(batch.labels[0], labels)
    wanted = np.moveaxis(flows, -1, 0) / 127.0
    strong = np.linalg.norm(wanted, axis=0) > 0.6
    np.testing.assert_allclose(batch.flows[0].numpy()[:, strong], wanted[:, strong], atol=0.02)


@pytest.mark.parametrize("index", range(8))
def test_flows_turn_with_the_patch_and_lead_every_nucleus_to_one_place(index):
    volumes = make_volumes(1, seed=3)
    augment = AugmentParams(flips=True, rotation="quarter", rescale_range=0.3)
    batch = one(maker_of(volumes, augment, shape=(24, 56, 56)), index)
    labels = batch.labels[0].astype(np.uint32)
    logit = np.where(labels > 0, 5.0, -5.0).astype(np.float32)
    found, _ = masks_from_field(FlowField.of(batch.flows[0].numpy(), logit, SIZE), 12.0, MaskSettings())
    whole = np.isin(labels, [n for n in np.unique(labels) if n and (labels == n).sum() > 100])
    (ap,) = average_precision(overlap_table(labels * whole, found * whole), (0.75,))
    assert ap == 1.0


def test_a_random_scale_is_the_same_along_all_axes():
    volumes = make_volumes(1)
    augment = AugmentParams(rescale_range=0.5)
    grid = CropGrid((16, 32, 32), 12.0, VoxelSize(2, 0.5, 0.5))
    for index in range(5):
        plan = draw_crop(volumes, 0, np.random.default_rng(index), augment, grid)
        assert plan.scale_y == plan.scale_x == pytest.approx(2 * plan.scale_z)
        assert 0.75 <= plan.scale_z <= 1.25


@pytest.mark.parametrize("share", ["nucleus_centred", "faint_centred"])
def test_patches_are_drawn_around_nuclei(share):
    volumes = make_volumes(2, shape=(40, 80, 80), nuclei=4)
    maker = maker_of(volumes, shape=(8, 24, 24), **{share: 1.0})
    anywhere = maker_of(volumes, shape=(8, 24, 24))
    hit, chance = (
        np.mean([one(m, index, volume=index % 2).foreground.any().item() for index in range(40)])
        for m in (maker, anywhere)
    )
    assert hit == 1.0
    assert chance < 0.9


def test_faint_patches_show_the_faintest_fifth():
    volumes = make_volumes(1, shape=(40, 80, 80), nuclei=10)
    maker = maker_of(volumes, shape=(4, 8, 8), faint_centred=1.0)
    faint = set(np.flatnonzero(volumes.nuclei[0].contrasts <= volumes.faint_contrast) + 1)
    assert len(faint) == 2
    for index in range(20):
        assert faint & set(np.unique(one(maker, index).labels))


def test_outside_the_volume_all_is_zero():
    volumes = make_volumes(1, shape=(6, 20, 20), nuclei=1)
    batch = one(maker_of(volumes, shape=(16, 32, 32)))
    outside = np.ones(batch.labels[0].shape, bool)
    # a larger patch is moved as far as the volume stays inside
    inside = np.argwhere(batch.images[0, 0].numpy() != 0)
    low, high = inside.min(axis=0), inside.max(axis=0) + 1
    assert tuple(high - low) == (6, 20, 20)
    outside[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = False
    assert not batch.images[0, 0].numpy()[outside].any()
    assert not batch.labels[0][outside].any()
    assert (batch.labels[0] > 0).sum() == (volumes.read(0).labels > 0).sum()


def test_a_dimmed_nucleus_is_dimmed_in_all_its_planes_alike():
    volumes = make_volumes(1, nuclei=3, shape=(20, 60, 60))
    before = one(maker_of(volumes, shape=(20, 60, 60)))
    changed = 0
    for index in range(3):
        augment = NO_AUGMENTATION.model_copy(update={"dim_share": 1.0, "dim_min": 0.2, "dim_noise": 0.0})
        after = one(maker_of(volumes, augment, shape=(20, 60, 60)), index)
        for label in range(1, 4):
            inside = before.labels[0] == label
            planes = [z for z in range(20) if inside[z].sum() > 40]
            # the middle planes: at the ends the blur mixes nucleus and background
            kept = np.array(
                [
                    np.median(after.images[0, 0].numpy()[z][inside[z]])
                    / np.median(before.images[0, 0].numpy()[z][inside[z]])
                    for z in planes[1:-1]
                ]
            )
            assert np.ptp(kept) < 0.2
            changed += int(kept.mean() < 0.8)
    assert changed >= 3


def test_light_falls_along_z_only():
    volumes = make_volumes(1)
    augment = NO_AUGMENTATION.model_copy(update={"depth_attenuation": 2.0})
    before, after = (one(maker_of(volumes, a)).images[0, 0].numpy() for a in (NO_AUGMENTATION, augment))
    bright = before > 0.3
    ratio = np.where(bright, after / np.where(bright, before, 1), np.nan)
    by_plane = np.nanmedian(ratio, axis=(1, 2))
    assert np.nanmax(np.nanstd(ratio, axis=(1, 2))) < 1e-4
    steps = np.diff(by_plane[np.isfinite(by_plane)])
    assert (steps < 0).all() or (steps > 0).all()
