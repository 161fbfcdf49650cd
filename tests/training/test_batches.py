import numpy as np
import pytest
import torch

from nuclei3d.config.sections import AugmentParams
from nuclei3d.training.crops import CropGrid
from nuclei3d.training.examples import BatchStream, CropMaker, validation_batches
from nuclei3d.training.samples import quantise_image
from slices_fixture import make_planes

EVERYTHING = AugmentParams(
    dim_share=0.5,
    depth_attenuation=1.0,
    blur_px=1.0,
    noise=0.1,
    low_resolution=0.5,
    brightness_linear=0.3,
    brightness_gamma=0.3,
)


GRID = CropGrid((1, 48, 48), 14.0)


def maker(augment=EVERYTHING, seed=5, **settings):
    return CropMaker(make_planes(), augment, GRID, seed, **settings)


def joined(batches):
    batches = list(batches)
    return torch.cat([b.images for b in batches]), torch.cat([b.flows for b in batches])


@pytest.mark.parametrize(("workers", "batch_size"), [(1, 5), (3, 4), (2, 12)])
def test_crops_depend_neither_on_workers_nor_on_batches(workers, batch_size):
    def stream(batch_size, workers):
        with BatchStream(
            maker(), lambda epoch: (np.arange(12) + epoch) % 6, range(3, 5), batch_size, workers
        ) as batches:
            return joined(batches)

    images, flows = stream(batch_size, workers)
    expected_images, expected_flows = stream(12, 1)
    assert len(images) == 2 * 12
    assert torch.equal(images, expected_images)
    assert torch.equal(flows, expected_flows)


def test_epochs_and_seeds_differ():
    order = np.zeros(2, np.int64)
    first, again, next_epoch = (maker().make_batch(order, epoch, 0).images for epoch in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, next_epoch)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, maker(seed=6).make_batch(order, 0, 0).images)


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


def test_validation_crops_are_the_same_every_time_and_normalised():
    planes = make_planes(9)
    first, second = (validation_batches(planes, 6, GRID, 4) for _ in range(2))
    assert [len(batch.samples) for batch in first] == [4, 2]
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, second, strict=True))
    assert {planes.infos[p].view for batch in first for p in batch.samples} == {"xy", "xz", "yz"}
    values = torch.cat([b.images[:, 0].flatten() for b in first])
    assert -0.2 < float(values.min()) < 0 < float(values.max()) < 1.3


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
