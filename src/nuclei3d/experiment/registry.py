"""The registry: versions of models, the challenger, the champion, the way back."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nuclei3d.config import Params
from nuclei3d.console import say, warn
from nuclei3d.errors import InputError, missing, reason_of
from nuclei3d.experiment.invocation import refuse_second_model
from nuclei3d.experiment.packing import log_served_model
from nuclei3d.experiment.provenance import md5_of_input
from nuclei3d.experiment.runs import METRICS_TAG, is_known, stage_run
from nuclei3d.experiment.store import open_store, store_lock
from nuclei3d.networks.folder import (
    INFO_FILE,
    Model,
    ModelInfo,
    TrainingFrames,
    check_output,
    digest_of_weights,
    load_model,
    read_info,
    scored_model,
)
from nuclei3d.scoring.metrics import parse_metrics
from nuclei3d.scoring.verdict import Verdict, judge, judge_first

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models.model import ModelInfo as LoggedModel

    from nuclei3d.experiment.serving_model import NucleiModel

CHAMPION = "champion"
CHALLENGER = "challenger"
_SCHEME = "models:/"
_SCHEMES = (_SCHEME, "runs:/", "mlflow-artifacts:/")
_HISTORY_TAG = "nuclei3d.champions"
_DIGEST_TAG = "nuclei3d.digest"
_COMPLETE_TAG = "nuclei3d.complete"
_REASON_TAG = "nuclei3d.reason"
_SCORES_TAG = "nuclei3d.scores_run"
_REGISTERED_TAG = "nuclei3d.registered"
_METRICS_FILE = "metrics.json"
_SCORES_FOLDER = "scores"


@dataclass(frozen=True)
class Registered:
    """What the registry holds after a call about one version: which is champion, and why it moved or stayed.

    `run_id` is the MLflow run that logged the model (None after a roll-back); `done_before` says that this
    very model with these very scores had been registered before.
    """

    name: str
    version: str
    champion: str | None
    reason: str
    run_id: str | None = None
    done_before: bool = False

    def as_json(self) -> dict[str, Any]:
        """Give the result as plain data."""
        return {
            "name": self.name,
            "version": self.version,
            "is_champion": self.champion == self.version,
            "champion": self.champion,
            "reason": self.reason,
            "uri": f"{_SCHEME}{self.name}/{self.version}",
            "run_id": self.run_id,
        }


def register(params: Params, folder: Path, metrics: Path, *, force: bool = False) -> Registered:
    """Register a model folder as the newest version: the challenger, and champion if it is better.

    The champion moves if the challenger is better on the same held-out embryos (see `judge`); where there is
    none, if it beats the naive baseline (`judge_first`); or by `force`. Nobody is judged on frames that a
    model was trained on. The reason is written on the version, as its description and as the tag
    ``nuclei3d.reason``. A model has one version: registered again it is told again, with other scores it is
    judged by them, and one that a killed process began is gone on with. The version, and the runs that
    trained and evaluated the model where the store has them, name each other in their tags.

    `metrics` is the metrics.json of its evaluation on held-out embryos, or the folder that holds it;
    InputError is raised where it is that of another model.
    `tracking` names the store and the registered model, `predict` gives the defaults of the service,
    `evaluate.primary_metric` decides.
    """
    refuse_second_model(params.predict)
    if not params.tracking.enabled:
        raise InputError("a model cannot be registered with tracking switched off; set tracking.enabled=true")
    if not folder.is_dir():
        raise missing(
            folder, f"{folder} is no model folder; give the folder that holds model.json and the weights"
        )
    model = load_model(folder)
    check_output(model)
    info = model.info
    metrics = metrics / _METRICS_FILE if metrics.is_dir() else metrics
    result = read_metrics(metrics)
    _check_scored(result, model, metrics)
    _mark_seen(result, info.frames, "the model")
    client = open_store(params.tracking)
    with store_lock(params.tracking):
        made = _register(client, params, folder, metrics, info, result, force)
    say(
        f"registered{' before' if made.done_before else ''} {made.name} version {made.version}: {made.reason}"
    )
    if made.champion is not None:
        say(f"champion of {made.name} is version {made.champion}")
    return made


def _register(
    client: MlflowClient,
    params: Params,
    folder: Path,
    metrics: Path,
    info: ModelInfo,
    result: Mapping[str, Any],
    force: bool,
) -> Registered:
    """Make the version and decide; on one machine nobody else does so meanwhile."""
    name = params.tracking.registered_name
    digest = _digest(folder, result)
    found = _version_of(client, name, digest)
    before, _ = _champion(client, name)
    same_scores = found is not None and found.tags[_DIGEST_TAG] == digest
    if found is not None and same_scores and _COMPLETE_TAG in found.tags and not force:
        version, reason = str(found.version), found.tags[_REASON_TAG]
        return Registered(name, version, before, reason, found.run_id, done_before=True)
    inputs, named = {"model": folder, "metrics": metrics}, f"register {info.name}"
    with stage_run("register", params, inputs=inputs, name=named) as run:
        if found is None:
            logged = log_served_model(folder, metrics, info, params.predict)
            found = _create_version(client, name, logged, run.run_id, digest)
        elif not same_scores:
            run.artifact(metrics, _SCORES_FOLDER)
            if _COMPLETE_TAG in found.tags:
                client.delete_model_version_tag(name, found.version, _COMPLETE_TAG)
            client.set_model_version_tag(name, found.version, _SCORES_TAG, run.run_id)
            client.set_model_version_tag(name, found.version, _DIGEST_TAG, digest)
        version = str(found.version)
        while True:
            before, _ = _champion(client, name)
            if version == before:
                # Evaluated anew, or killed after it had become champion: the verdict stands.
                verdict = Verdict(True, found.tags.get(_REASON_TAG, "it is the champion"))
            else:
                verdict = _compare_with_champion(client, name, before, result, params, force)
            if _champion(client, name)[0] == before:
                break
            # another machine, which the lock does not hold, made a champion meanwhile: compared with that one
        champion = version if verdict.better else before
        _describe(client, name, version, info, result, verdict)
        client.set_registered_model_alias(name, CHALLENGER, version)
        if champion != before:
            _promote(client, name, version, before)
        _link_runs(client, name, version, info, metrics)
        client.set_model_version_tag(name, version, _COMPLETE_TAG, "true")
        run.tags(
            {
                _REGISTERED_TAG: f"{name} version {version}",
                _REASON_TAG: verdict.reason,
                "mlflow.runName": f"{named}: version {version}{', champion' if champion == version else ''}",
            }
        )
    return Registered(name, version, champion, verdict.reason, run.run_id)


def _link_runs(client: MlflowClient, name: str, version: str, info: ModelInfo, metrics: Path) -> None:
    """Let the version and the runs that trained and evaluated the model name each other."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    evaluated = client.search_runs(
        experiments, f"tags.`{METRICS_TAG}` = '{md5_of_input(metrics)}'", max_results=1
    )
    runs = {"evaluate": evaluated[0].info.run_id if evaluated else None, "train": info.lineage.get("run_id")}
    for stage, run_id in runs.items():
        if run_id is not None and is_known(client, run_id):
            client.set_model_version_tag(name, version, f"nuclei3d.{stage}_run", run_id)
            client.set_tag(run_id, _REGISTERED_TAG, f"{name} version {version}")


def _check_scored(result: Mapping[str, Any], model: Model, metrics: Path) -> None:
    """Raise InputError for scores of another model; say what makes it doubtful that they are this one's."""
    scored, own = result.get("model") or {}, scored_model(model.info, digest_of_weights(model.path))
    if "weights_sha256" not in scored:
        warn(f"{metrics} does not say of which model it is; nuclei3d assess, and evaluate --model, do")
    elif scored["weights_sha256"] != own["weights_sha256"]:
        raise InputError(
            f"{metrics} holds the scores of another model ({scored.get('name')}, made "
            f"{scored.get('created')}) than {model.path.parent} (made {model.info.created}); evaluate this "
            "one: nuclei3d assess --model"
        )
    elif scored.get("thresholds") != own["thresholds"]:
        warn(f"{metrics} was scored with other thresholds than {model.path.parent} has: evaluate it anew")


def _mark_seen(result: Mapping[str, Any], frames: TrainingFrames | None, who: str) -> None:
    """Mark the volumes of a metrics.json that a model was trained on; say what makes them doubtful."""
    volumes: Mapping[str, Any] = result["volumes"]
    if frames is None or not frames.complete or not all("frame_digest" in v for v in volumes.values()):
        warn(
            f"whether {who} was trained on these volumes cannot be checked: model or evaluation are of a "
            "version that did not record it"
        )
    if frames is not None:
        frames.mark_seen(volumes)
    chosen = [name for name, volume in volumes.items() if volume.get("seen") == "validation"]
    if chosen:
        warn(f"epoch or thresholds of {who} were chosen on {', '.join(chosen[:3])}")


def roll_back(params: Params, version: str | None = None) -> Registered:
    """Make an earlier version the champion again: the one that was it before, or `version`."""
    client = open_store(params.tracking)
    name = params.tracking.registered_name
    with store_lock(params.tracking):
        known = _versions(client, name)
        now, history = _champion(client, name)
        if not known:
            raise InputError(f"the registry has no model '{name}' yet; nuclei3d register makes it")
        if version is None:
            earlier = [item for item in history if item != now]
            if not earlier:
                raise InputError(f"{name} has no earlier champion to go back to; name a version")
            version = earlier[-1]
        if version not in known:
            raise InputError(f"{name} has no version {version}; known: {', '.join(known)}")
        reason = f"rolled back from version {now}" if now else "made champion by hand"
        while version in history:
            history.pop()
        client.set_registered_model_alias(name, CHAMPION, version)
        client.set_registered_model_tag(name, _HISTORY_TAG, ",".join([*history, version]))
        client.set_model_version_tag(name, version, _REASON_TAG, reason)
    say(f"champion of {name} is version {version} again ({reason})")
    return Registered(name, version, version, reason)


def champions(params: Params) -> list[str]:
    """Give the champion's version, then those before it, the latest first; none without tracking."""
    if not params.tracking.enabled:
        return []
    client = open_store(params.tracking)
    name = params.tracking.registered_name
    now, history = _champion(client, name)
    if now is None:
        return []
    known = _versions(client, name)
    return list(dict.fromkeys([now, *(item for item in reversed(history) if item in known)]))


def is_registered(model: str) -> bool:
    """Tell whether ``--model`` names something that MLflow keeps, rather than a path."""
    return model.startswith(_SCHEMES)


def fetch_model(uri: str, params: Params) -> Path:
    """Give the folder of ``models:/name@alias`` or ``models:/name/version``, downloaded if need be."""
    package = _download(open_store(params.tracking), uri)
    for found in sorted((package / "artifacts").rglob("model.json")):
        return found.parent
    raise InputError(f"the MLflow model in {package} holds no model.json; it was not registered by nuclei3d")


def find_model(model: str, params: Params) -> Path:
    """Give the place of a model folder or weights file, or of ``models:/name@alias`` when it is fetched."""
    return fetch_model(model, params) if is_registered(model) else Path(model)


def load_served_model(model: str, params: Params) -> NucleiModel:
    """Load a model for the service: a URI of MLflow, or a model folder.

    The model folder is taken out of the registry and run by the installed package, not by the copy of the
    code that was logged with it: so an older version can still be served after the package was renewed.
    """
    refuse_second_model(params.predict)
    folder = find_model(model, params)
    if not folder.is_dir():
        raise missing(folder, f"{model} is no model folder; give one, or models:/name@champion")
    from nuclei3d.experiment.serving_model import NucleiModel

    served = NucleiModel()
    served.open(
        folder,
        {
            "root": params.serve.root,
            "max_voxels": params.serve.max_voxels,
            "max_network_voxels": params.serve.max_network_voxels,
            "device": params.predict.device,
            "predict": params.predict.model_dump(mode="json"),
        },
    )
    return served


def read_metrics(path: Path) -> dict[str, Any]:
    """Read a metrics.json."""
    try:
        return parse_metrics(path.read_bytes(), path)
    except OSError as error:
        raise InputError(
            f"cannot read the metrics {path}: {error.strerror}; nuclei3d evaluate writes it"
        ) from None


def _compare_with_champion(
    client: MlflowClient,
    name: str,
    champion: str | None,
    result: Mapping[str, Any],
    params: Params,
    force: bool,
) -> Verdict:
    metric = params.evaluate.primary_metric
    if champion is None:
        verdict = judge_first(result, metric=metric)
    else:
        who = f"champion (version {champion})"
        try:
            theirs, frames = _scores_of(client, name, champion)
            for volume, scores in theirs["volumes"].items():
                # an evaluation of before does not say it, and `judge` asks for the same truth
                if digest := result["volumes"].get(volume, {}).get("frame_digest"):
                    scores.setdefault("frame_digest", digest)
            _mark_seen(theirs, frames, f"the {who}")
            verdict = judge(theirs, result, who, seed=params.seed, metric=metric)
        except InputError as error:
            verdict = Verdict(False, f"the {who} has no metrics to compare with ({error})")
    if force and not verdict.better:
        verdict = replace(verdict, better=True, reason=f"forced; by itself: {verdict.reason}")
    elif not verdict.better:
        stays = "nobody is champion" if champion is None else "the champion stays"
        verdict = replace(verdict, reason=f"{verdict.reason}; {stays} (register --force overrides)")
    return verdict


def _scores_of(client: MlflowClient, name: str, version: str) -> tuple[dict[str, Any], TrainingFrames | None]:
    """Give the metrics.json that a version was judged by last, and the frames that its model has seen."""
    package = _download(client, f"{_SCHEME}{name}/{version}") / "artifacts"
    renewed = client.get_model_version(name, version).tags.get(_SCORES_TAG)
    folder = package if renewed is None else _download(client, f"runs:/{renewed}/{_SCORES_FOLDER}")
    # kept under the name that it was given with
    scores = read_metrics(next(folder.glob("*.json"), folder / _METRICS_FILE))
    described = next(package.rglob(INFO_FILE), None)
    return scores, None if described is None else read_info(described).frames


def _digest(folder: Path, result: Mapping[str, Any]) -> str:
    """Digest a model folder, then its scores per volume, which the registry compares; no report counts."""
    scores = {
        name: {key: value for key, value in volume.items() if key != "seen"}
        for name, volume in result["volumes"].items()
    }
    volumes = json.dumps(scores, sort_keys=True).encode()
    return md5_of_input(folder) + hashlib.md5(volumes, usedforsecurity=False).hexdigest()


def _version_of(client: MlflowClient, name: str, digest: str) -> ModelVersion | None:
    """Find the version of a model, whatever its scores; of several (made before) the one with these."""
    of_model = digest.partition(".")[0]
    versions = client.search_model_versions(f"name = '{name}'")
    found = [item for item in versions if item.tags.get(_DIGEST_TAG, "").startswith(of_model)]
    return max(found, key=lambda item: (item.tags[_DIGEST_TAG] == digest, int(item.version)), default=None)


def _download(client: MlflowClient, uri: str) -> Path:
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    try:
        return Path(download_artifacts(artifact_uri=uri))
    except (MlflowException, OSError) as error:
        names = ", ".join(sorted(model.name for model in client.search_registered_models())) or "none"
        reason = reason_of(error, 200)
        raise InputError(f"cannot get {uri}: {reason} (registered models: {names})") from None


def _create_version(
    client: MlflowClient, name: str, logged: LoggedModel, run_id: str | None, digest: str
) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(
            name, description="Segments nuclei in 3D images of embryos; made by the project nuclei3d."
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return client.create_model_version(
        name, logged.model_uri, run_id=run_id, tags={_DIGEST_TAG: digest}, model_id=logged.model_id
    )


def _describe(
    client: MlflowClient,
    name: str,
    version: str,
    info: ModelInfo,
    result: Mapping[str, Any],
    verdict: Verdict,
) -> None:
    ap = (result.get("ap") or {}).get("0.50")
    score = f"AP at .5 on the held-out embryos {ap:.3f}. " if isinstance(ap, int | float) else ""
    title = "Champion" if verdict.better else "Challenger"
    client.update_model_version(name, version, description=f"{score}{title}: {verdict.reason}.")
    tags = {
        _REASON_TAG: verdict.reason,
        "nuclei3d.kind": info.kind,
        "nuclei3d.volumes": ", ".join(sorted(result["volumes"])),
    }
    for key in ("ap", "f1"):
        value = (result.get(key) or {}).get("0.50")
        if value is not None:
            tags[f"{key}_0.50"] = f"{value:.4f}"
    if result.get("recall_faint") is not None:
        tags["recall_faint"] = f"{result['recall_faint']:.4f}"
    tags |= {f"nuclei3d.{key}": value for key, value in info.lineage.items() if key.isidentifier()}
    for key, value in tags.items():
        client.set_model_version_tag(name, version, key, str(value)[:5000])


def _promote(client: MlflowClient, name: str, version: str, before: str | None) -> None:
    client.set_registered_model_alias(name, CHAMPION, version)
    _, history = _champion(client, name)
    if before is not None and (not history or history[-1] != before):
        history.append(before)
    client.set_registered_model_tag(name, _HISTORY_TAG, ",".join([*history, version]))
    client.set_model_version_tag(
        name, version, "nuclei3d.champion_since", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    )


def _champion(client: MlflowClient, name: str) -> tuple[str | None, list[str]]:
    """Give the champion's version, None if there is none, and all that were champion, in their order."""
    from mlflow.exceptions import MlflowException

    try:
        model = client.get_registered_model(name)
    except MlflowException:
        return None, []
    now = model.aliases.get(CHAMPION)
    history = [item for item in model.tags.get(_HISTORY_TAG, "").split(",") if item]
    return None if now is None else str(now), history


def _versions(client: MlflowClient, name: str) -> list[str]:
    found = client.search_model_versions(f"name = '{name}'")
    return [str(item) for item in sorted(int(version.version) for version in found)]
