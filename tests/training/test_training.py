import io
import math

import numpy as np
import pytest
import torch
from cellpose.resnet_torch import CPnet

from nuclei3d.config.sections import AugmentParams, SamplingParams, TrainParams
from nuclei3d.training.crops import CropGrid
from nuclei3d.training.examples import NO_AUGMENTATION, Examples
from nuclei3d.training.learner import learning_rate
from nuclei3d.training.loop import (
    Callbacks,
    DivergedError,
    StopTraining,
    train_network,
)
from nuclei3d.training.samples import SampleSet
from nuclei3d.training.state import TrainingState, WeightAverage
from slices_fixture import make_planes

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


def small_network(seed=0):
    torch.manual_seed(seed)
    return CPnet([2, 4, 8, 16], 3, sz=3, diam_mean=14.0)


def examples_of(params, planes=None, validation=3, seed=3):
    grid = CropGrid.of_planes(params, 14.0)
    return Examples(planes or make_planes(6), make_planes(validation, seed=1), params, grid, seed=seed)


def run(start=None, callbacks=None, validation=3, network=None, **settings):
    params = TrainParams(**(SMALL | settings))
    return train_network(
        network or small_network(),
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
    losses = [report.train_loss for report in outcome.state.history]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("interrupted_after", [1, 2])
def test_a_resumed_training_ends_with_the_same_weights_bit_by_bit(optimizer, interrupted_after):
    settings = {"optimizer": optimizer, "ema": 0.9, "gradient_clip": 1.0, "augment": AugmentParams(noise=0.1)}
    states = []
    whole = run(callbacks=Callbacks(save=lambda state, best: states.append(stored(state))), **settings)
    resumed = run(start=states[interrupted_after - 1], network=small_network(seed=99), **settings)
    assert equal(whole.weights, resumed.weights)
    assert equal(whole.state.network, resumed.state.network)
    assert whole.epoch == resumed.epoch
    assert [r.train_loss for r in whole.state.history] == [r.train_loss for r in resumed.state.history]


def test_the_number_of_workers_does_not_change_the_weights():
    assert equal(run(workers=1).state.network, run(workers=3).state.network)


def test_seeds_change_the_weights():
    params = TrainParams(**SMALL)
    other = train_network(small_network(), examples_of(params, seed=4), params, device=CPU)
    assert not equal(run().state.network, other.state.network)


def test_the_best_epoch_is_kept_and_the_last_on_request():
    best = run(epochs=5)
    losses = [report.validation_loss for report in best.state.history]
    assert best.epoch == int(np.argmin(losses)) + 1
    last = run(epochs=5, select="last")
    assert last.epoch == 5
    assert equal(last.weights, last.state.network)


def test_the_average_precision_decides_where_it_is_measured():
    values = iter([0.2, 0.9, 0.4])
    outcome = run(
        validate_volumes_every=1, callbacks=Callbacks(validate_volumes=lambda network: next(values))
    )
    assert outcome.epoch == 2
    assert [report.volume_ap for report in outcome.state.history] == [0.2, 0.9, 0.4]


def test_without_validation_planes_the_training_loss_decides():
    outcome = run(validation=0)
    losses = [report.train_loss for report in outcome.state.history]
    assert all(math.isnan(report.validation_loss) for report in outcome.state.history)
    assert outcome.epoch == int(np.argmin(losses)) + 1


def test_training_stops_when_patience_ends():
    # with a learning rate of almost nothing, the running means alone make tiny differences
    outcome = run(epochs=50, patience=2, learning_rate=1e-12, validation=0)
    losses = [report.train_loss for report in outcome.state.history]
    assert outcome.state.epoch < 50
    assert "2 epochs" in outcome.stopped
    assert len(losses) - 1 - int(np.argmin(losses)) == 2


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


def test_a_loss_that_is_no_number_stops_with_the_last_good_state_saved():
    saved = []
    network = small_network()

    def poison(report):
        with torch.no_grad():
            next(network.output.parameters()).fill_(math.nan)

    with pytest.raises(DivergedError, match=r"epoch 2.*learning_rate"):
        run(
            network=network,
            callbacks=Callbacks(save=lambda state, best: saved.append(state), on_epoch=poison),
        )
    assert len(saved) == 1
    assert all(bool(torch.isfinite(value).all()) for value in saved[0].network.values())


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
    ).state.network
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
    mean = WeightAverage(network, 0.5)
    torch.nn.init.constant_(network.weight, 1.0)
    mean.update(0)
    # the first decay is 1/10
    assert float(mean.state()["weight"]) == pytest.approx(0.9)
    mean.update(100)
    assert float(mean.state()["weight"]) == pytest.approx(0.95)


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
    wide, narrow = (run(precision=p).state.history[-1].train_loss for p in ("float32", "bfloat16"))
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
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
    assert outcome.state.history[-1].train_loss == pytest.approx(expected.train_loss, rel=0.02)
    assert all(value.device.type == "cpu" for value in outcome.weights.values())
