"""The search with quick stand-ins for the training: what is tried, what is pruned, what survives a kill."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import requests
import search_toys
import yaml
from optuna.distributions import IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from nuclei3d.config import Params, load_params
from nuclei3d.config.sections import SearchParams
from nuclei3d.errors import InputError
from nuclei3d.stages.search.space import search_space
from nuclei3d.stages.search.study import SearchResult, search
from nuclei3d.stages.search.worker import new_pruner

DOCS = Path(__file__).parents[3] / "docs"


def parameters(*overrides: str) -> Params:
    return load_params(
        None, ["tracking.enabled=false", "train.epochs=4", "search.epochs={low: 2, high: 8}", *overrides]
    )


def run(folder: Path, *overrides: str, objective: Any = search_toys.bowl, **options: Any) -> SearchResult:
    slices = folder / "slices"
    slices.mkdir(exist_ok=True)
    out = folder / "search"
    return search(parameters(*overrides), slices, out, objective=objective, **({"trials": 6} | options))


def rows(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "search" / "study.json").read_text())["trials"]
    return found


def test_the_values_of_the_parameters_are_the_first_trial(tmp_path: Path) -> None:
    run(tmp_path, "train.learning_rate=0.0005", trials=2)
    first, second = rows(tmp_path)
    assert first["values"] == {
        "train.epochs": 4,
        "train.batch_size": 32,
        "train.learning_rate": 0.0005,
        "train.weight_decay": 0.0001,
    }
    assert second["values"] != first["values"]


def test_the_search_finds_better_values_than_it_starts_from(tmp_path: Path) -> None:
    result = run(tmp_path, "train.learning_rate=0.01", trials=12)
    assert result.start_value == pytest.approx(0.0)
    assert result.best.value > 0.5
    best = result.best.values["train.learning_rate"]
    assert isinstance(best, float)
    assert 10**-3.5 < best < 10**-2.5


def test_trials_are_counted_over_all_starts(tmp_path: Path) -> None:
    assert (first := run(tmp_path, trials=3)).trials["finished"] + first.trials["pruned"] == 3
    assert (again := run(tmp_path, trials=3)).trials["finished"] + again.trials["pruned"] == 3
    assert (more := run(tmp_path, trials=5)).trials["finished"] + more.trials["pruned"] == 5
    values = [json.dumps(row["values"]) for row in rows(tmp_path)]
    assert len(set(values)) == 5, "a restarted search drew the same values again"


def test_other_settings_do_not_enter_a_study(tmp_path: Path) -> None:
    run(tmp_path, trials=1)
    with pytest.raises(InputError, match=r"train\.crop_px was 224, is 128"):
        run(tmp_path, "train.crop_px=128", trials=2)
    # what is searched may differ: that is what --apply changes
    run(tmp_path, "train.learning_rate=0.002", trials=2)
    assert [row["state"] == "failed" for row in rows(tmp_path)] == [False, False]


def test_hopeless_trials_are_pruned_and_say_so(tmp_path: Path) -> None:
    result = run(tmp_path, "search.learning_rate={choices: [0.001, 0.1]}", trials=8)
    pruned = [row for row in rows(tmp_path) if row["state"] == "pruned"]
    assert result.trials["pruned"] == len(pruned) > 0
    for row in pruned:
        assert "given up after epoch" in row["reason"]
        assert row["value"] is None
        assert len(row["curve"]) < row["values"]["train.epochs"]
    assert run(tmp_path / "..", "search.prune=false", trials=4).trials["pruned"] == 0


def test_the_first_trial_is_never_given_up(tmp_path: Path) -> None:
    result = run(tmp_path, "train.learning_rate=0.01", "search.first_rung=0.2", trials=5, workers=2)
    assert result.start_value is not None


def report_half(trial: optuna.Trial, value: float) -> bool:
    """Report a value at the half of a trial's epochs; tell whether it is to be given up."""
    trial.report(value, 500)
    return trial.should_prune()


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_trial_that_was_put_back_is_counted_once() -> None:
    """Of 3, 2 and 1 the two best would fill the upper half if the 3 counted three times."""
    pruner = new_pruner(SearchParams(first_rung=0.5, reduction=2))
    study = optuna.create_study(direction="maximize", pruner=pruner)
    best = study.ask()
    report_half(best, 3.0)
    for _ in range(2):
        study._storage.set_trial_state_values(best._trial_id, TrialState.WAITING)
        again = study.ask()
        assert again.number == best.number
        assert not again.should_prune(), "it does not race against itself"
    report_half(study.ask(), 1.0)
    assert report_half(study.ask(), 0.5)
    assert not report_half(study.ask(), 2.0), "2 is among the better half of 3, 2, 1, 0.5"


def test_a_long_schedule_survives_the_comparison_with_short_ones(tmp_path: Path) -> None:
    """At equal numbers of crops an annealed short training always looks better than a long one in its middle.

    Here the longest is the best by construction. Compared at equal epochs, the trial of 32 epochs, whose loss
    after 8 is 0.78, would lose against that of 8, whose loss is then 0.125.
    """
    overrides = ["train.epochs=4", "search.epochs={choices: [4, 8, 32]}", "search.startup_trials=20"]
    result = run(tmp_path, *overrides, objective=search_toys.annealed, trials=10)
    finished = {row["values"]["train.epochs"] for row in rows(tmp_path) if row["state"] == "finished"}
    assert 32 in finished
    assert result.best.values["train.epochs"] == 32
    pruned = {row["values"]["train.epochs"] for row in rows(tmp_path) if row["state"] == "pruned"}
    assert pruned, "the comparison must have cut something, or this shows nothing"
    assert pruned <= {4, 8}


def test_out_of_memory_prunes_the_trial_and_says_so(tmp_path: Path) -> None:
    result = run(tmp_path, "train.batch_size=8", objective=search_toys.memory_hungry, trials=8)
    assert result.trials["failed"] == 0
    reasons = {row["values"]["train.batch_size"]: row["reason"] for row in rows(tmp_path)}
    assert all("out of memory" in reason for size, reason in reasons.items() if size > 16)
    assert any(size > 16 for size in reasons)
    assert result.best.values["train.batch_size"] in (8, 16)


def test_trials_with_errors_fail_and_too_many_stop_the_search(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"3 trials failed.*a real fault"):
        run(tmp_path, "train.batch_size=8", objective=search_toys.broken_for_large_batches, trials=50)
    # started again, the same command has another chance, and failed trials do not count
    overrides = ["train.batch_size=8", "search.max_failures=1000"]
    result = run(tmp_path, *overrides, objective=search_toys.broken_for_large_batches, trials=12)
    failed = [row for row in rows(tmp_path) if row["state"] == "failed"]
    assert result.trials["finished"] == 12
    assert result.trials["failed"] == len(failed) >= 3
    assert all(row["reason"] == "ZeroDivisionError: a real fault" for row in failed)


def test_unusable_input_stops_the_search_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^there are no slices$"):
        run(tmp_path, objective=search_toys.unusable_input)
    # with the input mended, nothing is missing: the values of the parameters are tried after all
    assert run(tmp_path, trials=2).start_value is not None


def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("first line\nno newline at the end")
    with pytest.raises(InputError, match="no journal"):
        run(tmp_path, storage=str(notes))
    assert notes.read_text() == "first line\nno newline at the end"


def test_a_second_command_on_a_journal_is_refused(tmp_path: Path) -> None:
    first = start_elsewhere(tmp_path, workers=1)
    journal = tmp_path / "search" / "study.journal"
    while first.poll() is None and not (journal.exists() and b'"worker"' in journal.read_bytes()):
        time.sleep(0.02)
    with pytest.raises(InputError, match=r"another search works on .*study\.journal.*--workers"):
        run(tmp_path, trials=6)
    assert first.wait(120) == 0, "the first one goes on undisturbed"
    assert run(tmp_path, trials=6).trials["failed"] == 0


def test_missing_slices_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no slice data set"):
        search(parameters(), tmp_path / "nowhere", tmp_path / "search", trials=2)
    assert not (tmp_path / "search").exists()


def test_a_trial_stopped_by_the_user_is_run_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, objective=search_toys.stopped_by_user, trials=2)
    result = run(tmp_path, trials=2)
    assert (result.trials["finished"] + result.trials["pruned"], result.trials["failed"]) == (2, 0)
    first, second = rows(tmp_path)
    assert (first["attempts"], second["attempts"]) == (2, 1)
    assert first["curve"]["250"] == -1.0, "what the first attempt told stays"
    assert len(first["curve"]) == 4
    assert result.start_value is not None


def test_a_trial_whose_process_dies_again_and_again_fails(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, objective=search_toys.stopped_by_user, trials=1)
    result = run(tmp_path, "search.max_retries=1", "search.prune=false", trials=1)
    assert (result.trials["finished"], result.trials["failed"]) == (1, 1)
    assert rows(tmp_path)[0]["reason"] == "its process died 2 times"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "search.more={train.augment.dim_shar: {low: 0, high: 0.5}}",
            "did you mean 'train.augment.dim_share'",
        ),
        ("search.more={prepare.step_xy: {low: 1, high: 2}}", "slices are not made again"),
        ("search.more={train.augment: {low: 1, high: 2}}", "no single value"),
        ("search.more={train.augment.dim_share: {low: 0, high: 2}}", r"train\.augment\.dim_share"),
        ("search.epochs={low: 1.5, high: 3, log: false}", "whole number"),
        ("train.weight_decay=0", "log: false"),
        ("search.more={train.width: {low: 16, high: 36}}", "multiple of 8"),
        ("search.more={train.width: {low: 16, high: 32, log: true}}", "give choices"),
    ],
)
def test_unusable_ranges_are_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(tmp_path, override)


def test_ranges_are_widened_to_hold_the_start() -> None:
    space = search_space(parameters("train.epochs=200", "train.batch_size=5"))
    assert space.distributions["train.epochs"].high == 200  # type: ignore[attr-defined]
    assert 5 in space.distributions["train.batch_size"].choices  # type: ignore[attr-defined]


def test_what_must_be_a_multiple_is_drawn_as_one() -> None:
    space = search_space(parameters("search.more={train.width: {low: 16, high: 32}}"))
    assert space.distributions["train.width"] == IntDistribution(16, 32, step=8)


def test_further_parameters_reach_the_training(tmp_path: Path) -> None:
    flip = "predict.flip_average: {choices: [true, false]}"
    run(tmp_path, f"search.more={{train.augment.dim_share: {{low: 0, high: 0.5}}, {flip}}}", trials=3)
    shares = [row["values"]["train.augment.dim_share"] for row in rows(tmp_path)]
    assert shares[0] == 0
    assert all(0 <= share <= 0.5 for share in shares)
    assert len(set(shares)) == 3


def test_only_apply_changes_the_parameter_file(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    text = "train:\n  epochs: 4  # few\n  learning_rate: 0.01  # too much\n"
    file.write_text(text)
    run(tmp_path, "train.learning_rate=0.01", params_file=file, trials=6)
    assert file.read_text() == text
    result = run(tmp_path, "train.learning_rate=0.01", params_file=file, trials=6, apply=True)
    assert result.applied
    written = yaml.safe_load(file.read_text())["train"]
    assert written["learning_rate"] == result.best.values["train.learning_rate"] != 0.01
    assert "# few" in file.read_text()
    assert "# too much" in file.read_text()
    with pytest.raises(InputError, match="--params"):
        run(tmp_path, params_file=tmp_path / "nowhere.yaml", apply=True)


def test_other_seeds_tell_luck_from_merit(tmp_path: Path) -> None:
    overrides = [
        "train.learning_rate=0.001",
        "search.learning_rate={choices: [0.001, 0.01]}",
        "search.confirm_seeds=2",
        "search.prune=false",
    ]
    result = run(tmp_path, *overrides, objective=search_toys.by_seed, trials=6)
    by_number = {int(row["trial"]): row for row in rows(tmp_path) if row["confirms"] is None}
    lucky = max(by_number.values(), key=lambda row: row["value"])
    assert lucky["values"]["train.learning_rate"] == 0.01
    assert result.best.values["train.learning_rate"] == 0.001
    assert all(len(values) == 3 for values in result.confirmed.values())
    # started again nothing is left to do
    again = run(tmp_path, *overrides, objective=search_toys.unusable_input, trials=6)
    assert again.confirmed == result.confirmed


def test_tables_plots_and_the_best_models_are_left(tmp_path: Path) -> None:
    result = run(tmp_path, "search.keep_models=2", trials=8)
    out = tmp_path / "search"
    page = (out / "search.html").read_text()
    for title in ("History", "Importance", "Parameters together", "compared on the way"):
        assert title in page
    assert page.count("Plotly.newPlot(") >= 3
    assert "cdn.plot.ly" not in page.replace("https://cdn.plot.ly/un/", "").split("<body>")[0]
    with (out / "study.csv").open() as file:
        assert [row["trial"] for row in csv.DictReader(file)] == [row["trial"] for row in rows(tmp_path)]
    assert result.model is not None
    assert (result.model / "model.json").is_file()
    assert len(list((out / "trials").iterdir())) <= 2


def test_several_workers_share_one_study(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^there are no slices$"):
        run(tmp_path, objective=search_toys.unusable_input, workers=2)
    result = run(tmp_path, trials=7, workers=2)
    assert result.trials["finished"] + result.trials["pruned"] == 7
    assert len([row for row in rows(tmp_path) if row["state"] != "failed"]) == 7


def test_a_worker_that_is_killed_is_replaced_and_its_trial_run_again(tmp_path: Path) -> None:
    result = run(tmp_path, "search.prune=false", objective=search_toys.dies_once, trials=5, workers=2)
    assert (result.trials["finished"], result.trials["failed"]) == (5, 0)
    assert [row["attempts"] for row in rows(tmp_path)] == [1, 1, 2, 1, 1]


def test_a_half_written_journal_is_mended(tmp_path: Path) -> None:
    run(tmp_path, "search.prune=false", trials=2)
    with (tmp_path / "search" / "study.journal").open("a") as file:
        file.write('{"op_code":4,"worker')
    assert run(tmp_path, "search.prune=false", trials=3).trials["finished"] == 3
    assert len(rows(tmp_path)) == 3


def start_elsewhere(folder: Path, workers: int) -> subprocess.Popen[bytes]:
    code = "import sys, pathlib; from test_search import run; "
    code += "run(pathlib.Path(sys.argv[1]), trials=6, workers=int(sys.argv[2]))"
    return search_toys.start_elsewhere(code, folder, workers)


def test_kills_at_random_times_lose_nothing(tmp_path: Path) -> None:
    journal = tmp_path / "search" / "study.journal"
    draw = random.Random(1)
    seen: list[FrozenTrial] = []
    for _ in range(3):
        size = journal.stat().st_size if journal.exists() else 0
        process = start_elsewhere(tmp_path, workers=1)
        # once this start has begun to write, at any time
        while process.poll() is None and (not journal.exists() or journal.stat().st_size == size):
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.8))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        storage = JournalStorage(JournalFileBackend(str(journal)))
        seen += optuna.load_study(study_name="search", storage=storage).get_trials()
    result = run(tmp_path, trials=6)
    assert (result.trials["finished"] + result.trials["pruned"], result.trials["failed"]) == (6, 0)
    trials = rows(tmp_path)
    assert len(trials) == 6
    assert any(row["attempts"] > 1 for row in trials), "a kill must have hit a trial, or this shows nothing"
    for before in seen:
        row = trials[before.number]
        assert before.params.items() <= row["values"].items()
        curve = {str(step): value for step, value in before.intermediate_values.items()}
        assert curve.items() <= row["curve"].items(), "the curve goes on from where it was"


def test_workers_die_with_the_process_that_started_them(tmp_path: Path) -> None:
    import psutil

    leader = start_elsewhere(tmp_path, workers=2)
    trials = tmp_path / "search" / "study.journal"
    while leader.poll() is None and not (trials.exists() and b'"worker"' in trials.read_bytes()):
        time.sleep(0.05)
    workers = psutil.Process(leader.pid).children(recursive=True)
    assert len(workers) >= 2
    leader.kill()
    leader.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive


def test_optunas_dashboard_opens_the_study_as_documented(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("optuna-dashboard")
    if not program.is_file():
        pytest.skip("optuna-dashboard is not installed: pip install 'nuclei3d[dashboard]'")
    documented = "optuna-dashboard runs/search/study.journal"
    assert documented in (DOCS / "search.md").read_text()
    run(tmp_path, trials=3)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    journal = tmp_path / "search" / documented.split("/")[-1]
    command = [str(program), str(journal), "--port", str(port), "--server", "wsgiref", "--quiet"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 120
        while True:
            try:
                answer = requests.get(f"http://127.0.0.1:{port}/api/studies", timeout=10).json()
                break
            except requests.RequestException:
                assert process.poll() is None, "the dashboard ended"
                assert time.monotonic() < end, "the dashboard never came up"
                time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    assert [study["study_name"] for study in answer["study_summaries"]] == ["search"]


@pytest.mark.parametrize("script", sorted((DOCS / "slurm").glob("*.sh")), ids=lambda path: path.name)
def test_slurm_scripts_are_valid_shell(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.read_text().startswith("#!/usr/bin/env bash\n")


def test_slurm_scripts_call_commands_that_exist() -> None:
    from typer.main import get_command

    from nuclei3d.cli import app

    known = {
        name: {option for parameter in command.params for option in parameter.opts}
        for name, command in get_command(app).commands.items()
    }  # type: ignore[attr-defined]
    scripts = sorted((DOCS / "slurm").glob("*.sh"))
    assert len(scripts) >= 3
    for script in scripts:
        words = script.read_text().replace("\\\n", " ")
        calls = [
            line.split() for line in words.splitlines() if "nuclei3d " in line and not line.startswith("#")
        ]
        assert calls
        for call in calls:
            command = call[call.index("nuclei3d") + 1]
            options = {word for word in call if word.startswith("--") and word != "--ntasks=1"}
            assert options <= known[command], f"{script.name} calls {command} with unknown options"
