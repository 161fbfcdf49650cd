import math

import numpy as np
import pytest
from scipy import ndimage

from nuclei3d.config.sections import AugmentParams
from nuclei3d.flows import flows_2d
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.training.augmentation import (
    Appearance,
    add_noise,
    attenuate,
    blur,
    blur_sigmas,
    brighten,
    coarse_factors,
    coarsen,
    correlate_noise,
    depth_of_crop,
    dim_nuclei,
    draw_appearance,
    draw_dimming,
    local_background,
    noise_correlation,
    noise_of_crop,
)
from nuclei3d.training.crops import CropGrid, CropPlan, crop_generator, cut_crop, draw_crop
from slices_fixture import draw_plane, one_plane, plane_info
from volumes_fixture import make_volumes

UPRIGHT = (1.0, 0.0, 0.0, 1.0)
TURNED = (0.0, -1.0, 1.0, 0.0)


def cut(image, labels, plan, size):
    crop = np.empty((1, size, size), np.float32)
    crop_labels = np.empty((1, size, size), np.int32)
    crop_flows = np.empty((2, 1, size, size), np.float32)
    cut_crop(*one_plane(image, labels).read(0), 1.0, 0.0, plan, True, crop, crop_labels, crop_flows)
    return crop[0], crop_labels[0], crop_flows[:, 0]


def angles(a, b, where):
    """Angles in degrees between two fields of vectors, at some pixels."""
    a, b = a[:, where], b[:, where]
    length = np.hypot(*a) * np.hypot(*b)
    return np.degrees(np.arccos(np.clip((a * b).sum(axis=0) / length, -1, 1)))


def whole(size, q=UPRIGHT, scale=1.0):
    return CropPlan(0.5, size / 2, size / 2, 1.0, *q, 1.0, scale, scale)


def dim(image, labels, keeps, noise, radius_px, strength=1.0):
    """Dim nuclei of a plane in place."""
    keeps = np.asarray(keeps, np.float32)
    dim_nuclei(image[None], labels[None], keeps, noise[None], radius_px, (1.0, 1.0, 1.0), strength)


def grid_of(size, **settings):
    return CropGrid((1, size, size), 14.0, **settings)


@pytest.fixture
def plane():
    return draw_plane(np.random.default_rng(1), size=64)


def test_an_unchanged_crop_is_the_plane_itself(plane):
    image, labels = plane
    crop, crop_labels, crop_flows = cut(image, labels, whole(64), 64)
    np.testing.assert_array_equal(crop, image.astype(np.float32))
    np.testing.assert_array_equal(crop_labels, labels)
    assert np.percentile(angles(crop_flows, flows_2d(labels), np.hypot(*crop_flows) > 0.5), 99) < 1


@pytest.mark.parametrize(
    ("q", "turn"),
    [
        ((0.0, -1.0, 1.0, 0.0), lambda a: np.rot90(a, 3)),
        ((-1.0, 0.0, 0.0, -1.0), lambda a: np.rot90(a, 2)),
        ((-1.0, 0.0, 0.0, 1.0), np.flipud),
        ((1.0, 0.0, 0.0, -1.0), np.fliplr),
        ((0.0, 1.0, 1.0, 0.0), np.transpose),
    ],
)
def test_flows_turn_with_the_crop_as_if_computed_on_the_turned_labels(plane, q, turn):
    image, labels = plane
    crop, crop_labels, crop_flows = cut(image, labels, whole(64, q), 64)
    np.testing.assert_array_equal(crop_labels, turn(labels))
    np.testing.assert_array_equal(crop, turn(image))
    # the median pixel of an even region may move by one, so near the centre directions may differ
    expected = flows_2d(np.ascontiguousarray(turn(labels)))
    assert np.median(angles(crop_flows, expected, np.hypot(*crop_flows) > 0.5)) < 1.5
    assert np.percentile(angles(crop_flows, expected, np.hypot(*crop_flows) > 0.5), 90) < 10


def test_the_inverse_turn_gives_the_plane_back(plane):
    image, labels = plane
    crop, crop_labels, _ = cut(image, labels, whole(64, TURNED), 64)
    back, back_labels, _ = cut(crop.astype(np.uint16), crop_labels, whole(64, (0.0, 1.0, -1.0, 0.0)), 64)
    np.testing.assert_array_equal(back, image)
    np.testing.assert_array_equal(back_labels, labels)


@pytest.mark.parametrize("scale", [0.7, 1.3])
def test_flows_of_a_rescaled_crop_are_those_of_the_rescaled_labels(plane, scale):
    image, labels = plane
    _, crop_labels, crop_flows = cut(image, labels, whole(64, scale=scale), 96)
    expected = flows_2d(crop_labels)
    apart = angles(crop_flows, expected, (np.hypot(*crop_flows) > 0.9) & (np.hypot(*expected) > 0.9))
    assert np.median(apart) < 5
    lengths = np.hypot(*crop_flows)[crop_labels > 0]
    assert lengths.max() <= 1 + 1e-5
    assert np.median(lengths) == pytest.approx(1, abs=1e-5)


def test_shrinking_averages_instead_of_aliasing():
    rng = np.random.default_rng(0)
    noise = rng.normal(1000, 100, (128, 128)).clip(0).astype(np.uint16)
    crop, _, _ = cut(noise, np.zeros_like(noise), whole(128, scale=0.5), 64)
    # the mean of 2 x 2 pixels has half the standard deviation
    assert crop.std() == pytest.approx(50, rel=0.1)


def test_outside_the_plane_all_is_zero(plane):
    image, labels = plane
    crop, crop_labels, crop_flows = cut(image, labels, whole(64), 128)
    assert not crop[:32].any()
    assert not crop_labels[:32].any()
    assert not crop_flows[:, :32].any()
    np.testing.assert_array_equal(crop[32:96, 32:96], image.astype(np.float32))


def test_crops_stay_inside_larger_planes_and_hold_smaller_ones(plane):
    image, labels = plane
    planes = one_plane(image, labels)
    augment = AugmentParams(rescale_range=0.0)
    for size in (32, 96):
        for index in range(50):
            plan = draw_crop(planes, 0, crop_generator(0, 0, index, 0), augment, grid_of(size))
            low, high = sorted((size / 2, 64 - size / 2))
            assert low <= plan.centre_y <= high
            assert low <= plan.centre_x <= high


def test_nucleus_centred_crops_have_a_nucleus_in_the_middle():
    labels = np.zeros((200, 200), np.uint16)
    labels[90:100, 60:70] = 1
    image = labels * 100
    planes, grid = one_plane(image, labels), grid_of(64, nucleus_centred=1.0)
    for index in range(20):
        plan = draw_crop(planes, 0, crop_generator(0, 0, index, 0), AugmentParams(), grid)
        assert 90 <= plan.centre_y <= 100
        assert 60 <= plan.centre_x <= 70


@pytest.mark.parametrize(("view", "upright"), [("xy", False), ("xz", True), ("yz", True)])
def test_z_can_be_kept_upright(plane, view, upright):
    image, labels = plane
    planes = one_plane(image, labels, view)
    augment = AugmentParams(flip_z=False, side_rotation="none", rotation="none")
    signs = {
        draw_crop(planes, 0, crop_generator(0, 0, index, 0), augment, grid_of(64)).q00 for index in range(40)
    }
    assert signs == ({1.0} if upright else {1.0, -1.0})


def test_all_changes_are_off_by_default():
    assert draw_appearance(AugmentParams(), np.random.default_rng(0)) == Appearance()


def test_each_change_has_random_numbers_of_its_own():
    def draw(**settings):
        return draw_appearance(AugmentParams(**settings), crop_generator(3, 2, 1, 1))

    alone = draw(blur_px=2.0)
    together = draw(blur_px=2.0, noise=0.1, brightness_gamma=0.5, depth_attenuation=1.0, low_resolution=0.9)
    assert alone.blur == together.blur > 0
    assert draw(noise=0.1).noise == together.noise
    assert draw(brightness_gamma=0.5).gamma == together.gamma


def test_the_axial_direction_turns_with_the_plane():
    upright, turned = whole(64), whole(64, TURNED)
    labels, grid = np.zeros((64, 64), np.uint16), grid_of(64)
    for side in (plane_info("xz", labels), plane_info("yz", labels)):
        assert blur_sigmas(0.5, 2.0, upright, side, grid)[1:] == (1.0, 0.5)
        assert blur_sigmas(0.5, 2.0, turned, side, grid)[1:] == (0.5, 1.0)
        assert coarse_factors(3.0, upright, side, grid) == (1.0, 3.0, 1.0)
        assert coarse_factors(3.0, turned, side, grid) == (1.0, 1.0, 3.0)
    flat = plane_info("xy", labels)
    assert blur_sigmas(0.5, 2.0, upright, flat, grid)[1:] == (0.5, 0.5)
    assert coarse_factors(3.0, turned, flat, grid) == (1.0, 3.0, 3.0)


def test_the_axial_direction_of_a_volume_is_its_first_axis_in_voxels_of_the_grid():
    solid = CropGrid((8, 64, 64), 14.0, VoxelSize(4.0, 1.0, 1.0))
    info = make_volumes(1).infos[0]
    for plan in (whole(64), whole(64, TURNED)):
        assert blur_sigmas(1.0, 2.0, plan, info, solid) == (0.5, 1.0, 1.0)
        assert coarse_factors(6.0, plan, info, solid) == (1.5, 1.0, 1.0)


def test_dimming_is_log_uniform_for_the_wished_share():
    keeps = draw_dimming(AugmentParams(dim_share=0.4, dim_min=0.1), 20000, np.random.default_rng(0))
    dimmed = keeps[keeps < 1]
    assert keeps[0] == 1
    assert len(dimmed) / 20000 == pytest.approx(0.4, abs=0.02)
    assert dimmed.min() >= 0.1 - 1e-6
    assert np.median(dimmed) == pytest.approx(math.sqrt(0.1), rel=0.05)


def test_a_dimmed_nucleus_keeps_the_wished_share_of_its_light_above_background():
    labels = np.zeros((64, 64), np.uint16)
    labels[10:30, 10:30] = 1
    labels[40:60, 40:60] = 2
    image = np.where(labels > 0, 1.0, 0.2).astype(np.float32)
    dim(image, labels, [1, 0.3, 1], np.zeros_like(image), 10)
    assert image[20, 20] == pytest.approx(0.2 + 0.8 * 0.3, abs=0.01)
    assert image[50, 50] == 1.0
    assert image[35, 35] == pytest.approx(0.2)


@pytest.mark.parametrize(("strength", "low", "high"), [(1.0, 0.8, 1.2), (0.0, 0.0, 0.5)])
def test_the_noise_of_a_dimmed_nucleus_is_that_of_an_image_taken_so_dim(strength, low, high):
    """Against a Poisson image of the dimmed scene itself."""
    rng = np.random.default_rng(0)
    labels = np.zeros((96, 96), np.uint16)
    labels[16:80, 16:80] = 1
    photons, background, keep = 400.0, 50.0, 0.25
    image = rng.poisson(np.where(labels > 0, photons, background)).astype(np.float32)
    noise = rng.standard_normal(image.shape).astype(np.float32)
    dim(image, labels, [1, keep], noise, 20, strength)
    inside = image[24:72, 24:72]
    expected = background + (photons - background) * keep
    assert inside.mean() == pytest.approx(expected, rel=0.03)
    assert low < inside.var() / expected < high


def test_the_noise_estimate_finds_poisson_noise():
    rng = np.random.default_rng(0)
    labels = np.zeros((128, 128), np.uint16)
    labels[:, 64:] = 1
    image = rng.poisson(np.where(labels > 0, 300.0, 40.0)).astype(np.float32)
    variance, level, gain = noise_of_crop(image, labels, 0.0, 0.0)
    assert level == pytest.approx(40, rel=0.02)
    assert variance == pytest.approx(40, rel=0.15)
    assert gain == pytest.approx(1, rel=0.15)


def test_noise_put_back_is_correlated_as_that_of_interpolated_planes():
    """A plane whose rows were interpolated threefold from z, as xz planes are."""
    rng = np.random.default_rng(0)
    labels = np.zeros((240, 240), np.uint16)
    for number in range(16):
        y, x = 12 + 60 * (number // 4), 12 + 60 * (number % 4)
        labels[y : y + 36, x : x + 36] = number + 1
    keep = 0.25

    def take(light):
        planes = rng.poisson(light[1::3]).astype(np.float32)
        return ndimage.zoom(planes, (3, 1), order=1, mode="nearest", grid_mode=True)

    def inside(image):
        crops = [image[y : y + 24, x : x + 24] for y in range(18, 240, 60) for x in range(18, 240, 60)]
        return np.stack([crop - crop.mean() for crop in crops])

    image = take(np.where(labels > 0, 400.0, 50.0))
    keeps = np.where(np.arange(17) > 0, keep, 1).astype(np.float32)
    dim(image, labels, keeps, rng.standard_normal(image.shape).astype(np.float32), 30)
    dimmed, true = inside(image), inside(take(np.where(labels > 0, 50 + 350 * keep, 50.0)))
    assert dimmed.var() == pytest.approx(true.var(), rel=0.2)
    for axis in (1, 2):
        found, wanted = ((np.roll(a, 1, axis) * a).mean() / a.var() for a in (dimmed, true))
        assert found == pytest.approx(wanted, abs=0.2)


def test_white_noise_is_found_uncorrelated():
    image = np.random.default_rng(0).normal(5, 1, (128, 128)).astype(np.float32)
    labels = np.zeros((128, 128), np.uint16)
    assert noise_correlation(image, labels, True) < 0.1
    assert noise_correlation(image, labels, False) < 0.1


@pytest.mark.parametrize(("along_y", "along_x"), [(0.0, 0.0), (0.6, 0.0), (0.3, 0.7)])
def test_correlated_noise_keeps_its_variance(along_y, along_x):
    noise = np.random.default_rng(0).standard_normal((400, 400)).astype(np.float32)
    correlate_noise(noise, along_y, along_x)
    assert noise.var() == pytest.approx(1, rel=0.05)
    assert (noise[1:] * noise[:-1]).mean() == pytest.approx(along_y, abs=0.06)
    assert (noise[:, 1:] * noise[:, :-1]).mean() == pytest.approx(along_x, abs=0.06)


def test_the_local_background_is_the_mean_of_unlabelled_pixels_around():
    rng = np.random.default_rng(0)
    image, labels = draw_plane(rng, 48)
    image = image.astype(np.float32)
    background = local_background(image, labels, 9)
    free = (labels == 0).astype(float)
    share = ndimage.uniform_filter(free, 19, mode="constant")
    some = share > 1e-6
    mean = ndimage.uniform_filter(image * free, 19, mode="constant")[some] / share[some]
    np.testing.assert_allclose(background[some], mean, rtol=1e-3)
    np.testing.assert_allclose(background[~some], image[labels == 0].mean(), rtol=1e-4)


@pytest.mark.parametrize("sigmas", [(0.0, 1.5, 0.0), (0.0, 0.0, 2.0), (1.2, 0.7, 1.9)])
def test_blur_is_a_gaussian_filter(sigmas):
    image = np.random.default_rng(0).normal(size=(12, 40, 33)).astype(np.float32)
    # scipy cuts at int(truncate * sigma + 0.5), here at the next integer above 3 sigma
    radius = [math.ceil(3 * s) if s else 0 for s in sigmas]
    expected = ndimage.gaussian_filter(image, sigmas, mode="reflect", radius=radius)
    blur(image, sigmas)
    np.testing.assert_allclose(image, expected, atol=1e-5)


def test_light_falls_exponentially_with_depth_from_either_side():
    labels = np.zeros((100, 100), np.uint16)

    def faded(attenuation, view):
        image = np.ones((1, 100, 100), np.float32)
        attenuate(image, attenuation, *depth_of_crop(whole(100), plane_info(view, labels)))
        return image[0]

    rows = (np.arange(100) + 0.5) / 100
    np.testing.assert_allclose(faded(2.0, "xz"), np.exp(-2 * rows)[:, None].repeat(100, 1), rtol=1e-5)
    np.testing.assert_allclose(faded(-2.0, "xz")[:, 0], np.exp(-2 * (1 - rows)), rtol=1e-5)
    np.testing.assert_allclose(faded(-0.5, "xy"), math.exp(-0.5), rtol=1e-5)


def test_coarse_crops_keep_their_mean_and_lose_detail():
    image = np.random.default_rng(0).normal(5, 1, (64, 64)).astype(np.float32)
    before = image.copy()
    coarsen(image[None], (1.0, 1.0, 4.0))
    assert image.mean() == pytest.approx(before.mean(), rel=1e-3)
    blocks = before.reshape(64, 16, 4).mean(axis=2)
    # between the middles of two blocks lies the mean of both
    np.testing.assert_allclose(image[:, 3:5].mean(axis=1), blocks[:, :2].mean(axis=1), rtol=1e-4)
    # along z, a volume of the same columns comes out the same
    volume = np.ascontiguousarray(before.T[:, :, None].repeat(3, axis=2))
    coarsen(volume, (4.0, 1.0, 1.0))
    np.testing.assert_allclose(volume[:, :, 1], image.T, rtol=1e-6)


def test_added_noise_grows_with_the_root_of_the_intensity():
    rng = np.random.default_rng(0)
    image = np.ones((1, 128, 128), np.float32)
    image[0, :64] = 0
    add_noise(image, rng.standard_normal(image.shape).astype(np.float32), 0.1)
    image = image[0]
    assert image[:64].std() == pytest.approx(0.05, rel=0.05)
    assert image[64:].std() == pytest.approx(0.1 * math.sqrt(1.25), rel=0.05)


def test_brightness_is_gain_offset_and_exponent():
    image = np.array([[[0.25, -0.25, 1.0]]], np.float32)
    brighten(image, 2.0, 0.1, 0.5)
    np.testing.assert_allclose(image, [[[1.1, -0.9, 2.1]]], rtol=1e-6)
