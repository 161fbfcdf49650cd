import io
import math
import threading

import numpy as np
import pytest
import torch
from cellpose.resnet_torch import CPnet

from nuclei3d.config.sections import AugmentParams, Full3dParams, SamplingParams, TrainParams
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.planning import plan_architecture
from nuclei3d.networks.unet3d import Architecture, VolumeSpec, new_volume_network
from nuclei3d.scoring.matching import average_precision, overlap_table
from nuclei3d.segmentation.dynamics import masks_from_field
from nuclei3d.segmentation.flow_field import FlowField
from nuclei3d.segmentation.settings import MaskSettings
from nuclei3d.training.arithmetic import Arithmetic
from nuclei3d.training.crops import CropGrid
from nuclei3d.training.examples import NO_AUGMENTATION, Examples, validation_batches
from nuclei3d.training.learner import average_weights, learning_rate
from nuclei3d.training.loop import (
    Callbacks,
    DivergedError,
    StopTraining,
    TrainingState,
    train_network,
)
from nuclei3d.training.samples import SampleSet, plane_contrasts
from slices_fixture import make_planes
from volumes_fixture import make_volumes

CPU = torch.device("cpu")
SMALL = {
    "diameter_px": 14.0,
    "epochs": 3,
    "batch_size": 4,
    "crops_per_epoch": 8,
    "crop_px": 32,
    "learning_rate": 0.003,
    "warmup_steps": 2,
    "validation_crops": 4,
    "precision": "float32",
}


SOLID = {
    "network": "full3d",
    "diameter_px": 12.0,
    "batch_size": 2,
    "crops_per_epoch": 4,
    "learning_rate": 0.01,
}
SPEC = VolumeSpec(Architecture((4, 8), ((1, 2, 2),), ((1, 3, 3), (3, 3, 3)), 2), 2.0, (8, 16, 16))
BOTH = pytest.mark.parametrize("kind", [{}, SOLID], ids=["planes", "volumes"])


def small_network(seed=0):
    torch.manual_seed(seed)
    return CPnet([2, 4, 8, 16], 3, sz=3, diam_mean=14.0)


def examples_of(params, samples=None, validation=3, seed=3, spec=SPEC):
    make = make_planes
    if params.network == "full3d":
        make, grid = make_volumes, CropGrid.of_volumes(params, spec, 12.0)
    else:
        grid = CropGrid.of_planes(params, 14.0)
    return Examples(samples or make(6), make(validation, seed=1), params, grid, seed=seed)


def run(start=None, callbacks=None, validation=3, module=None, network_seed=0, **settings):
    params = TrainParams(**(SMALL | settings))
    fresh = (
        new_volume_network(SPEC, network_seed) if params.network == "full3d" else small_network(network_seed)
    )
    return train_network(
        module or fresh,
        examples_of(params, validation=validation),
        params,
        device=CPU,
        start=start,
        callbacks=callbacks,
    )


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stored(state):
    """A state after it was written to and read from a file, without unpickling code."""
    buffer = io.BytesIO()
    torch.save(state.as_plain(), buffer)
    buffer.seek(0)
    return TrainingState.from_plain(torch.load(buffer, weights_only=True), dict(state.best))


def test_a_network_learns_a_crop_by_heart():
    outcome = run(
        epochs=10,
        crops_per_epoch=40,
        learning_rate=0.02,
        augment=NO_AUGMENTATION,
        crop_px=64,
    )
    losses = [report["train_loss"] for report in outcome.state.history]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("kind", [{"optimizer": "adamw"}, {"optimizer": "sgd"}, SOLID])
@pytest.mark.parametrize("interrupted_after", [1, 2])
def test_a_resumed_training_ends_with_the_same_weights_bit_by_bit(kind, interrupted_after):
    augment = AugmentParams(noise=0.1, dim_share=0.5)
    settings = {"ema": 0.9, "gradient_clip": 1.0, "augment": augment} | kind
    states = []
    whole = run(callbacks=Callbacks(save=lambda state, best: states.append(stored(state))), **settings)
    resumed = run(start=states[interrupted_after - 1], network_seed=99, **settings)
    assert equal(whole.weights, resumed.weights)
    assert equal(whole.state.learner["network"], resumed.state.learner["network"])
    assert whole.epoch == resumed.epoch
    for name in ("train_loss", "train_flow_cosine_z"):
        values = ([report[name] for report in made.state.history] for made in (whole, resumed))
        np.testing.assert_array_equal(*values)


@BOTH
def test_the_number_of_workers_does_not_change_the_weights(kind):
    assert equal(
        run(workers=1, **kind).state.learner["network"], run(workers=3, **kind).state.learner["network"]
    )


def test_seeds_change_the_weights():
    params = TrainParams(**SMALL)
    other = train_network(small_network(), examples_of(params, seed=4), params, device=CPU)
    assert not equal(run().state.learner["network"], other.state.learner["network"])


def test_the_best_epoch_is_kept_and_the_last_on_request():
    best = run(epochs=5)
    losses = [report["validation_loss"] for report in best.state.history]
    assert best.epoch == int(np.argmin(losses)) + 1
    last = run(epochs=5, select="last")
    assert last.epoch == 5
    assert equal(last.weights, last.state.learner["network"])


def test_the_average_precision_decides_where_it_is_measured():
    values = iter([0.2, 0.9, 0.4])
    outcome = run(
        validate_volumes_every=1, callbacks=Callbacks(validate_volumes=lambda network: next(values))
    )
    assert outcome.epoch == 2
    assert [report["volume_ap"] for report in outcome.state.history] == [0.2, 0.9, 0.4]


@BOTH
def test_without_validation_samples_the_training_loss_decides(kind):
    outcome = run(validation=0, **kind)
    losses = [report["train_loss"] for report in outcome.state.history]
    assert all(math.isnan(report["validation_loss"]) for report in outcome.state.history)
    assert outcome.epoch == int(np.argmin(losses)) + 1


def test_training_stops_when_patience_ends():
    # with a learning rate of almost nothing, the running means alone make tiny differences
    outcome = run(epochs=50, patience=2, learning_rate=1e-12, validation=0)
    losses = [report["train_loss"] for report in outcome.state.history]
    assert outcome.state.epoch < 50
    assert "2 epochs" in outcome.stopped
    assert len(losses) - 1 - int(np.argmin(losses)) == 2


def test_the_share_found_of_nuclei_is_the_mean_by_quintile_of_contrast():
    class Bright(torch.nn.Module):
        def forward(self, images):
            return torch.cat([torch.zeros_like(images), images[:, :1] - 0.6], 1)

    params = TrainParams(**(SMALL | {"validation_crops": 7, "batch_size": 3}))
    float32 = Arithmetic(CPU, torch.float32, torch.contiguous_format)
    figures = examples_of(params).validate(Bright(), float32)
    shares = []
    grid = CropGrid((1, 32, 32), 14.0)
    for batch in validation_batches(make_planes(3, seed=1), 7, grid, 3):
        for image, labels in zip(batch.images[:, 0].numpy(), batch.labels, strict=True):
            contrasts = plane_contrasts(image, labels)
            for label in np.unique(labels[labels > 0]):
                inside = labels == label
                if inside.sum() >= 12 and np.isfinite(contrasts[label]):
                    shares.append((contrasts[label], (image[inside] > 0.6).mean()))
    quintiles = np.array_split([share for _, share in sorted(shares)], 5)
    names = ("faintest", "faint", "middle", "bright", "brightest")
    found = [figures[f"found_{name}"] for name in names]
    assert found == pytest.approx([float(part.mean()) for part in quintiles])
    assert min(found) < max(found)


def test_a_callback_can_stop_the_training():
    def stop(report):
        if report.epoch == 2:
            raise StopTraining("enough")

    outcome = run(callbacks=Callbacks(on_epoch=stop))
    assert (outcome.state.epoch, outcome.stopped) == (2, "enough")


def test_a_callbacks_own_exception_passes_after_the_checkpoint():
    class PrunedError(Exception):
        pass

    saved = []

    def prune(report):
        raise PrunedError

    with pytest.raises(PrunedError):
        run(callbacks=Callbacks(save=lambda state, best: saved.append(state.epoch), on_epoch=prune))
    assert saved == [1]


def test_a_state_is_saved_while_the_next_epoch_is_trained():
    reported, saved, trained = [], [], threading.Event()

    def save(state, best):
        assert state.epoch > 1 or trained.wait(60)
        saved.append(state.epoch)

    def step(loss, count, rate):
        if reported:
            trained.set()

    run(
        epochs=2,
        callbacks=Callbacks(save=save, on_step=step, on_epoch=lambda report: reported.append(report.epoch)),
    )
    assert reported == saved == [1, 2]


def test_a_state_that_cannot_be_saved_ends_the_training():
    def save(state, best):
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        run(epochs=1, callbacks=Callbacks(save=save))


def test_a_loss_that_is_no_number_stops_with_the_last_good_state_saved():
    saved = []
    network = small_network()

    def poison(report):
        with torch.no_grad():
            next(network.output.parameters()).fill_(math.nan)

    with pytest.raises(DivergedError, match=r"epoch 2.*learning_rate"):
        run(
            module=network,
            callbacks=Callbacks(save=lambda state, best: saved.append(state), on_epoch=poison),
        )
    assert len(saved) == 1
    assert all(bool(torch.isfinite(value).all()) for value in saved[0].learner["network"].values())


def test_an_exploding_loss_stops_the_training():
    with pytest.raises(DivergedError, match="learning_rate"):
        run(optimizer="sgd", learning_rate=50.0, warmup_steps=0, schedule="constant", epochs=20)


def test_a_gradient_clip_bounds_the_step():
    before = small_network().state_dict()
    after = run(
        optimizer="sgd",
        momentum=0.0,
        weight_decay=0.0,
        learning_rate=1.0,
        warmup_steps=0,
        schedule="constant",
        gradient_clip=0.01,
        epochs=1,
        crops_per_epoch=4,
    ).state.learner["network"]
    trained = [name for name, _ in small_network().named_parameters()]
    length = math.sqrt(sum(float((after[n] - before[n]).square().sum()) for n in trained))
    assert length == pytest.approx(0.01, rel=1e-3)


def test_diameters_stay_what_they_are():
    outcome = run(weight_decay=0.5)
    assert float(outcome.weights["diam_mean"]) == 14.0


def test_sparse_planes_can_be_left_out():
    planes = make_planes(4, nuclei=1)
    params = TrainParams(**(SMALL | {"sampling": SamplingParams(sparse=0), "crops_per_epoch": None}))
    rich = make_planes(6)
    mixed = SampleSet(
        rich.infos + planes.infos,
        np.concatenate([rich.step, planes.step]),
        np.concatenate([rich.offset, planes.offset]),
        rich.nuclei + planes.nuclei,
        np.concatenate([rich.flow_power, planes.flow_power]),
        lambda plane: rich.read(plane) if plane < 6 else planes.read(plane - 6),
    )
    counted = []
    train_network(
        small_network(),
        examples_of(params, mixed, validation=0, seed=0),
        params,
        device=CPU,
        callbacks=Callbacks(on_step=lambda loss, count, rate: counted.append(count)),
    )
    assert sum(counted) == 6 * params.epochs


def test_the_mean_of_weights_is_exponential():
    network = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(network.weight, 0.0)
    mean = average_weights(network, 0.5)
    torch.nn.init.constant_(network.weight, 1.0)
    mean.update_parameters(network)
    # the first decay is 1/10
    assert float(mean.module.state_dict()["weight"]) == pytest.approx(0.9)
    mean.n_averaged.fill_(101)
    mean.update_parameters(network)
    assert float(mean.module.state_dict()["weight"]) == pytest.approx(0.95)


@pytest.mark.parametrize("epochs", [5, 60, 150, 400])
def test_the_cellpose_schedule_is_that_of_its_train_seg(epochs):
    rates = np.append(np.linspace(0, 0.1, 10), 0.1 * np.ones(max(0, epochs - 10)))
    if epochs > 300:
        rates = rates[:-100]
        for _ in range(10):
            rates = np.append(rates, rates[-1] / 2 * np.ones(10))
    elif epochs > 100:
        rates = rates[:-50]
        for _ in range(10):
            rates = np.append(rates, rates[-1] / 2 * np.ones(5))
    params = TrainParams(schedule="cellpose", learning_rate=0.1, epochs=epochs)
    ours = [learning_rate(params, 7 * epoch + 3, 7) for epoch in range(epochs)]
    np.testing.assert_allclose(ours, rates[:epochs], rtol=1e-12)


def test_the_constant_schedule_does_not_know_the_number_of_epochs():
    short, long = (
        [learning_rate(TrainParams(schedule="constant", epochs=epochs), step, 10) for step in range(90)]
        for epochs in (9, 90)
    )
    assert short == long
    assert short[0] < short[20] < short[-1] == TrainParams().learning_rate


def test_the_cosine_rises_and_falls_to_a_hundredth():
    params = TrainParams(schedule="warmup_cosine", warmup_steps=10, epochs=10, learning_rate=1.0)
    rates = [learning_rate(params, step, 10) for step in range(100)]
    assert rates[9] == pytest.approx(10 / 11)
    assert max(rates) == rates[10] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.01)
    assert all(np.diff(rates[10:]) <= 0)


def test_bfloat16_trains_to_about_the_same_loss():
    wide, narrow = (run(precision=p).state.history[-1]["train_loss"] for p in ("float32", "bfloat16"))
    assert narrow == pytest.approx(wide, rel=0.05)


def test_reports_tell_views_and_contrast():
    report = run().state.history[-1]
    metrics = report.metrics()
    assert {"validation_loss_xy", "validation_loss_xz", "validation_loss_yz"} <= set(metrics)
    assert 0 <= metrics["found_faintest"] <= 1
    assert metrics["validation_loss"] == pytest.approx(
        metrics["validation_flow_loss"] + metrics["validation_probability_loss"]
    )
    assert "volume_ap" not in metrics


@pytest.mark.parametrize("anisotropy", [2.2, 5.75])
def test_one_crop_is_learned_by_heart_with_its_z_flows(anisotropy):
    # 12 px across, as deep as the voxels allow: the network, the loss and the dynamics fit together
    size = VoxelSize(anisotropy, 1.0, 1.0)
    architecture = plan_architecture(anisotropy, "small")
    depth = round(30 / anisotropy / architecture.multiple[0]) * architecture.multiple[0]
    volumes = make_volumes(1, size, (depth, 24, 24), seed=2, nuclei=4)
    spec = VolumeSpec(architecture, anisotropy, (depth, 24, 24))
    params = TrainParams(
        **(SMALL | SOLID | {"crops_per_epoch": 40}),
        augment=NO_AUGMENTATION,
        full3d=Full3dParams(nucleus_centred=0.0, faint_centred=0.0),
    )
    network = new_volume_network(spec, 0)
    outcome = train_network(network, examples_of(params, volumes, 0, spec=spec), params, device=CPU)
    report = outcome.state.history[-1]
    assert min(report["train_flow_cosine_z"], report["train_flow_cosine_y"]) >= 0.95
    network.load_state_dict(outcome.weights)
    image = torch.from_numpy((volumes.read(0).pixels.astype(np.float32) - 50) / 400)[None, None]
    with torch.no_grad():
        output = network.eval()(image.repeat(2, 1, 1, 1, 1))[0].numpy()
    found, _ = masks_from_field(FlowField.of(output[:3] / 5, output[3], size), 12.0, MaskSettings())
    (ap,) = average_precision(overlap_table(volumes.read(0).labels.astype(np.uint32), found), (0.75,))
    assert ap == 1.0


def test_every_epoch_tells_each_axis_and_the_foreground():
    reports = run(**SOLID).state.history
    for report in reports:
        for part in ("train", "validation"):
            for axis in "zyx":
                assert math.isfinite(report[f"{part}_flow_mse_{axis}"])
                assert -1 <= report[f"{part}_flow_cosine_{axis}"] <= 1
            assert 0 <= report[f"{part}_dice"] <= 1
        assert report["validation_loss"] == pytest.approx(
            report["validation_flow_loss"] + report["validation_probability_loss"]
        )
        assert 0 <= report["found_faintest"] <= 1


def test_an_epoch_has_a_patch_for_every_nucleus():
    params = TrainParams(**(SMALL | SOLID | {"crops_per_epoch": None}))
    volumes = make_volumes(2, nuclei=5)
    assert examples_of(params, volumes).crops == 10


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [True, False])
def test_training_on_a_gpu_reaches_about_the_same_loss(graph):
    params = TrainParams(**(SMALL | {"workers": 4, "cuda_graph": graph}))
    network = small_network()
    outcome = train_network(
        network,
        examples_of(params),
        params,
        device=torch.device("cuda"),
    )
    expected = run().state.history[-1]
    assert outcome.state.history[-1]["train_loss"] == pytest.approx(expected["train_loss"], rel=0.02)
    assert all(value.device.type == "cpu" for value in outcome.weights.values())
