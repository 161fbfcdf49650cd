import io
import math

import numpy as np
import pytest
import torch

from nuclei3d.config.sections import AugmentParams, Full3dParams, TrainParams
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.planning import plan_architecture
from nuclei3d.networks.unet3d import Architecture, VolumeSpec, new_volume_network
from nuclei3d.scoring.matching import average_precision, overlap_table
from nuclei3d.segmentation.dynamics import masks_from_flows
from nuclei3d.segmentation.settings import MaskSettings
from nuclei3d.training.crops import CropGrid
from nuclei3d.training.examples import NO_AUGMENTATION, Examples
from nuclei3d.training.loop import Callbacks, train_network
from nuclei3d.training.state import TrainingState
from volumes_fixture import make_volumes

CPU = torch.device("cpu")
SIZE = VoxelSize(2.0, 1.0, 1.0)
TINY = Architecture((4, 8), ((1, 2, 2),), ((1, 3, 3), (3, 3, 3)), 2)
SMALL = {
    "network": "full3d",
    "diameter_px": 12.0,
    "epochs": 3,
    "batch_size": 2,
    "crops_per_epoch": 4,
    "learning_rate": 0.01,
    "warmup_steps": 2,
    "validation_crops": 4,
    "precision": "float32",
}


def examples_of(params, spec, volumes=None, validation=2, seed=3):
    grid = CropGrid.of_volumes(params, spec, 12.0)
    return Examples(volumes or make_volumes(3), make_volumes(validation, seed=1), params, grid, seed=seed)


def run(start=None, callbacks=None, network_seed=0, validation=2, volumes=None, **settings):
    params = TrainParams(**(SMALL | settings))
    spec = VolumeSpec(TINY, 2.0, (8, 16, 16))
    return train_network(
        new_volume_network(spec, network_seed),
        examples_of(params, spec, volumes, validation),
        params,
        device=CPU,
        start=start,
        callbacks=callbacks,
    )


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("anisotropy", [2.2, 5.75])
def test_one_crop_is_learned_by_heart_with_its_z_flows(anisotropy):
    # 12 px across, as deep as the voxels allow: the network, the loss and the dynamics fit together
    size = VoxelSize(anisotropy, 1.0, 1.0)
    architecture = plan_architecture(anisotropy, "small")
    depth = round(30 / anisotropy / architecture.multiple[0]) * architecture.multiple[0]
    volumes = make_volumes(1, size, (depth, 24, 24), seed=2, nuclei=4)
    spec = VolumeSpec(architecture, anisotropy, (depth, 24, 24))
    params = TrainParams(
        **(SMALL | {"epochs": 3, "batch_size": 2, "crops_per_epoch": 40, "learning_rate": 0.01}),
        augment=NO_AUGMENTATION,
        full3d=Full3dParams(nucleus_centred=0.0, faint_centred=0.0),
    )
    network = new_volume_network(spec, 0)
    outcome = train_network(network, examples_of(params, spec, volumes, 0), params, device=CPU)
    report = outcome.state.history[-1]
    assert min(report["train_flow_cosine_z"], report["train_flow_cosine_y"]) >= 0.95
    network.load_state_dict(outcome.weights)
    image = torch.from_numpy((volumes.read(0).pixels.astype(np.float32) - 50) / 400)[None, None]
    with torch.no_grad():
        output = network.eval()(image.repeat(2, 1, 1, 1, 1))[0].numpy()
    found, _ = masks_from_flows(output[:3] / 5, output[3], size, 12.0, MaskSettings())
    (ap,) = average_precision(overlap_table(volumes.read(0).labels.astype(np.uint32), found), (0.75,))
    assert ap == 1.0


@pytest.mark.parametrize("interrupted_after", [1, 2])
def test_a_resumed_training_ends_with_the_same_weights_bit_by_bit(interrupted_after):
    settings = {"ema": 0.9, "augment": AugmentParams(noise=0.1, dim_share=0.5)}
    states = []

    def keep(state, best):
        buffer = io.BytesIO()
        torch.save(state.as_plain(), buffer)
        buffer.seek(0)
        states.append(TrainingState.from_plain(torch.load(buffer, weights_only=True), dict(state.best)))

    whole = run(callbacks=Callbacks(save=keep), **settings)
    resumed = run(start=states[interrupted_after - 1], network_seed=99, **settings)
    assert equal(whole.weights, resumed.weights)
    assert whole.state.history[-1]["train_flow_cosine_z"] == resumed.state.history[-1]["train_flow_cosine_z"]


def test_the_number_of_workers_does_not_change_the_weights():
    assert equal(run(workers=1).state.network, run(workers=3).state.network)


def test_every_epoch_tells_each_axis_and_the_foreground():
    reports = run().state.history
    for report in reports:
        for part in ("train", "validation"):
            for axis in "zyx":
                assert math.isfinite(report[f"{part}_flow_mse_{axis}"])
                assert -1 <= report[f"{part}_flow_cosine_{axis}"] <= 1
            assert 0 <= report[f"{part}_dice"] <= 1
        assert report.validation_loss == pytest.approx(
            report["validation_flow_loss"] + report["validation_probability_loss"]
        )
        assert 0 <= report["found_faintest"] <= 1


def test_without_validation_volumes_the_training_loss_decides():
    outcome = run(validation=0)
    assert all(math.isnan(report.validation_loss) for report in outcome.state.history)
    assert outcome.epoch == int(np.argmin([report.train_loss for report in outcome.state.history])) + 1


def test_an_epoch_has_a_patch_for_every_nucleus():
    params = TrainParams(**(SMALL | {"crops_per_epoch": None}))
    volumes = make_volumes(2, nuclei=5)
    spec = VolumeSpec(TINY, 2.0, (8, 16, 16))
    assert examples_of(params, spec, volumes).crops == 10
