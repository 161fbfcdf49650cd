import pytest
import torch

from nuclei3d.errors import InputError
from nuclei3d.networks.planning import plan_architecture, plan_patch
from nuclei3d.networks.unet3d import Architecture, VolumeSpec, count_parameters, new_volume_network


def spec_of(anisotropy, profile="small", **settings):
    architecture = plan_architecture(anisotropy, profile, **settings)
    return VolumeSpec(architecture, anisotropy, plan_patch(architecture, 12.0, anisotropy, 2.0))


@pytest.mark.parametrize("anisotropy", [1, 1.5, 2, 2.2, 3, 4.1, 5.75, 8, 10, 11.5, 12])
@pytest.mark.parametrize("profile", ["default", "small"])
def test_no_axis_is_pooled_or_convolved_while_its_spacing_exceeds_twice_the_finest(anisotropy, profile):
    shape = plan_architecture(anisotropy, profile)
    depth, width = anisotropy, 1.0
    for level, kernel in enumerate(shape.kernels):
        near = depth <= 2 * width
        assert kernel == ((3 if near else 1), 3, 3)
        if level < len(shape.pooling):
            assert shape.pooling[level] == ((2 if near else 1), 2, 2)
            depth, width = depth * shape.pooling[level][0], 2 * width
    # a network that never sees depth cannot learn the z flow
    assert any(kernel[0] == 3 for kernel in shape.kernels)


@pytest.mark.parametrize("anisotropy", [1, 2.2, 5.75, 11.5, 12])
def test_every_output_depends_on_planes_above_and_below(anisotropy):
    spec = spec_of(anisotropy)
    network = new_volume_network(spec, seed=1).eval()
    image = torch.randn((1, 1, *spec.patch), requires_grad=True)
    z, y, x = (size // 2 for size in spec.patch)
    network(image)[0, :, z, y, x].sum().backward()
    seen = torch.nonzero(image.grad[0, 0].abs().amax(dim=(1, 2)))[:, 0]
    assert seen.min() < z < seen.max()


@pytest.mark.parametrize("anisotropy", [1, 2.2, 5.75, 12])
@pytest.mark.parametrize("style", [False, True])
def test_output_has_four_channels_and_the_size_of_the_patch(anisotropy, style):
    spec = spec_of(anisotropy, style=style)
    network = new_volume_network(spec, seed=0).eval()
    with torch.no_grad():
        assert network(torch.zeros(2, 1, *spec.patch)).shape == (2, 4, *spec.patch)


def test_profiles_have_the_size_that_they_promise():
    for anisotropy in (1.0, 2.2, 5.75, 11.5):
        assert 2e6 < count_parameters(new_volume_network(spec_of(anisotropy, "default"), 0)) < 8e6
        assert 1e5 < count_parameters(new_volume_network(spec_of(anisotropy, "small"), 0)) < 6e5
    assert 5e6 < count_parameters(new_volume_network(spec_of(2.2, "default"), 0)) < 7e6


def test_isotropic_pooling_ignores_the_voxel_size():
    shape = plan_architecture(11.5, "small", pooling="isotropic")
    assert set(shape.kernels) == {(3, 3, 3)}
    assert set(shape.pooling) == {(2, 2, 2)}


def test_patches_cover_the_nucleus_along_every_axis():
    shape = plan_architecture(5.75)
    patch = plan_patch(shape, 30.0, 5.75, 4.0)
    assert all(size % multiple == 0 for size, multiple in zip(patch, shape.multiple, strict=True))
    assert patch[1] == patch[2] == 120
    assert patch[0] == pytest.approx(4 * 30 / 5.75, abs=shape.multiple[0])


def test_seeds_decide_the_weights_and_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (new_volume_network(spec_of(2.2), seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("anisotropy", [0, -1, 1e6, float("nan")])
def test_senseless_voxels_are_refused(anisotropy):
    with pytest.raises(InputError, match="voxel"):
        plan_architecture(anisotropy)


def test_a_shape_that_is_none_is_refused():
    with pytest.raises(ValueError, match="no shape"):
        Architecture((8, 16), ((2, 2, 2),), ((3, 3, 3),), 2)
