import numpy as np
import pytest

from nuclei3d.config.sections import AugmentParams
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.scoring.matching import average_precision, overlap_table
from nuclei3d.segmentation.dynamics import masks_from_flows
from nuclei3d.segmentation.settings import MaskSettings
from nuclei3d.training.crops import CropGrid, draw_crop
from nuclei3d.training.examples import NO_AUGMENTATION, CropMaker, validation_batches
from volumes_fixture import make_volumes

SIZE = VoxelSize(2.0, 1.0, 1.0)


def maker_of(volumes, augment=NO_AUGMENTATION, shape=(20, 40, 40), voxel_size=SIZE, seed=0, **settings):
    return CropMaker(volumes, augment, CropGrid(shape, 12.0, voxel_size, **settings), seed)


def one(maker, index=0, epoch=0, volume=0):
    return maker.make_batch(np.array([volume]), epoch, index)


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
    found, _ = masks_from_flows(batch.flows[0].numpy(), logit, SIZE, 12.0, MaskSettings())
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


def test_a_patch_depends_on_seed_epoch_and_number_only():
    volumes = make_volumes(2)
    augment = AugmentParams(
        dim_share=0.5, noise=0.1, blur_px=1.0, depth_attenuation=0.5, brightness_gamma=0.3
    )
    maker = maker_of(volumes, augment, shape=(8, 16, 16), nucleus_centred=0.5)
    whole = maker.make_batch(np.array([0, 1, 0]), 2, 5)
    alone = maker.make_batch(np.array([1]), 2, 6)
    np.testing.assert_array_equal(whole.images[1], alone.images[0])
    np.testing.assert_array_equal(whole.labels[1], alone.labels[0])
    for other in (
        one(maker, 6, epoch=3, volume=1),
        one(maker_of(volumes, augment, (8, 16, 16), seed=1), 6, 2, 1),
    ):
        assert not np.array_equal(other.images[0], alone.images[0])


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


def test_validation_patches_are_fixed_and_come_from_every_volume():
    volumes = make_volumes(3)
    grid = CropGrid((8, 16, 16), 12.0, SIZE, nucleus_centred=0.5)
    first, again = (validation_batches(volumes, 6, grid, 4) for _ in range(2))
    assert [len(batch.samples) for batch in first] == [4, 2]
    assert {int(v) for batch in first for v in batch.samples} == {0, 1, 2}
    assert all(np.array_equal(a.images, b.images) for a, b in zip(first, again, strict=True))
