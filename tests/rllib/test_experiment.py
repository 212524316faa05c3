"""Experiments: definitions that can be compared, statistics over seeds, refusals."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

pytest.importorskip("ray")

from tprl_env.evaluation.experiment_tables import (
    RESULTS,
    check_experiment,
    markdown,
    read_records,
    results,
    seed_intervals,
    write_tables,
)
from tprl_env.rllib.config import presets_folder
from tprl_env.rllib.experiments.definition import (
    Arm,
    Experiment,
    Search,
    Trial,
    imitation_key,
    load_experiment,
    run_key,
)
from tprl_env.rllib.experiments.trial import reporting_hook

SHIPPED = sorted(
    path.stem for path in (presets_folder() / "experiments").glob("*.py") if path.stem != "__init__"
)
PRINTS = {"train": "a", "calibration": "b", "test": "c"}


def experiment(**fields) -> Experiment:
    given = {
        "name": "small",
        "question": "Is b better?",
        "arms": {"a": Arm(), "b": Arm({"algorithm.lr": 1e-3})},
        "seeds": (0, 1, 2),
        "budgets": (4, 2),
    }
    return Experiment(**{**given, **fields})


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_experiment_loads_under_its_own_name(name):
    spec = load_experiment(name)
    assert spec.name == name and spec.question.endswith(("?", "."))
    if isinstance(spec, Experiment):
        trials = spec.trials()
        assert len(trials) == len(spec.tasks) * len(spec.arms) * len(spec.seeds)
        assert {trial.config.limits.max_scores for trial in trials} == {spec.max_scores}
        own = [trial for trial in trials if trial.task == spec.tasks[0]]
        keys = {(run_key(trial, PRINTS, spec.budgets), trial.code_width) for trial in own}
        assert len(keys) == len(own)  # no arm repeats another
    else:
        assert spec.config({}).limits.max_scores == spec.max_scores


def test_the_optimizers_are_compared_over_five_seeds_from_the_same_imitations():
    spec = load_experiment("compare_optimizers")
    assert len(spec.seeds) >= 5
    trials = spec.trials()
    assert {trial.config.algorithm.name for trial in trials} == {"ppo", "grpo", "mapo"}
    for seed in spec.seeds:
        own = [t.config for t in trials if t.seed == seed and t.task == "crowded"]
        assert len({imitation_key(config, PRINTS) for config in own}) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seeds": (0, 1, 0)}, "counts a seed twice"),
        ({"seeds": ()}, "needs arms, tasks, seeds"),
        ({"arms": {"A b": Arm()}}, "lower-case"),
        ({"arms": {"a": Arm({"limits.max_scores": 5})}}, "sets limits.max_scores itself"),
        ({"changes": {"seed": 1}}, "sets seed itself"),
        ({"arms": {"a": Arm({"learning_rate": 1})}}, "no field 'learning_rate'"),
        ({"arms": {"a": Arm({"rollout.draws": 3, "rules.reward_batch_size": 7})}}, "must divide"),
    ],
)
def test_what_cannot_be_compared_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        experiment(**fields)


def test_a_search_is_refused_with_the_nearest_field():
    with pytest.raises(ValueError, match=r"did you mean 'algorithm\.entropy'"):
        Search(name="s", question="?", space={"algorithm.entropi": None})
    with pytest.raises(ValueError, match="grace_scores <= max_scores"):
        Search(name="s", question="?", space={"algorithm.lr": None}, grace_scores=10, max_scores=5)


def test_files_that_hold_no_experiment_are_refused(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'compare_optimizers'"):
        load_experiment("compare_optimisers")
    with pytest.raises(ValueError, match="no experiment file"):
        load_experiment(tmp_path / "x.py")
    (tmp_path / "y.py").write_text("CONFIG = 1\n")
    with pytest.raises(ValueError, match="must define EXPERIMENT"):
        load_experiment(tmp_path / "y.py")


def test_imitations_are_shared_where_and_only_where_they_would_be_equal():
    base = experiment().trials()[0].config
    same = [
        base.replace(**{"algorithm.lr": 1.0}),
        base.replace(**{"algorithm.clip": 0.1}),
        base.replace(**{"limits.max_scores": 7}),
    ]
    assert {imitation_key(config, PRINTS) for config in same} == {imitation_key(base, PRINTS)}
    others = [
        base.replace(seed=9),
        base.replace(**{"policy.width": 32}),
        base.replace(**{"imitation.demonstrator": "vispruner"}),
        base.replace(**{"imitation.steps": 5}),
        base.replace(**{"rules.budget": (5, 9)}),
    ]
    keys = {imitation_key(config, PRINTS) for config in (base, *others)}
    assert len(keys) == len(others) + 1
    assert imitation_key(base, PRINTS) != imitation_key(base, PRINTS | {"train": "z"})
    assert imitation_key(base.replace(**{"imitation.demonstrator": "none"}), PRINTS) is None


def test_runs_are_the_same_only_with_equal_config_data_and_budgets():
    trial = experiment().trials()[0]
    key = run_key(trial, PRINTS, (4, 2))
    moved = Trial("sparse", "z", trial.seed, trial.config.replace(source="elsewhere"), 64)
    assert run_key(moved, PRINTS, (4, 2)) == key
    assert run_key(trial, PRINTS | {"test": "z"}, (4, 2)) != key
    assert run_key(trial, PRINTS, (4,)) != key
    changed = Trial("crowded", "a", 0, trial.config.replace(**{"algorithm.gamma": 0.5}), 64)
    assert run_key(changed, PRINTS, (4, 2)) != key


def measured(values) -> dict:
    return {
        "full_accuracy": 0.8,
        "questions": 100,
        "redundancy_penalty": {"4": 0.0, "2": "coverage"},
        "seconds": 5.0,
        "budgets": [
            {"budget": k, "mean_tokens": float(k), "accuracy": v, "ci95": [v - 0.1, v + 0.1]}
            for k, v in zip((4, 2), values, strict=True)
        ],
    }


def finished(folder, *, scores=1000, skip=(), **fields):
    """A folder of finished runs: arm b is better by .1, .2, .3 at 4 tokens and equal at 2."""
    spec = experiment(**fields)
    runs = {trial.name: f"runs/{run_key(trial, PRINTS, spec.budgets)}" for trial in spec.trials()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "experiment.json").write_text(json.dumps(spec.as_dict() | {"runs": runs}))
    for trial in spec.trials():
        if trial.name in skip:
            continue
        gain = 0.1 * (trial.seed + 1) if trial.arm == "b" else 0.0
        place = folder / runs[trial.name]
        place.mkdir(parents=True)
        record = {
            "key": place.name,
            "algorithm": "ppo",
            "seed": trial.seed,
            "lvlm_scores": scores if trial.arm == "a" else 1000,
            "scores_per_iteration": 256,
            "env_steps": 1000,
            "seconds": 10.0,
            "policy": measured((0.4 + gain, 0.2)),
            "imitation": measured((0.3, 0.2)),
            "curve": [{"lvlm_scores": 0, "accuracy": {"4": 0.3, "2": 0.1}}],
        }
        (place / "record.json").write_text(json.dumps(record))
    return folder


def test_student_intervals_by_hand():
    ((mean, half),) = seed_intervals(pd.DataFrame({4: [0.1, 0.2, 0.3]})).to_numpy()
    assert mean == pytest.approx(0.2)
    assert half == pytest.approx(4.302652729911275 * 0.1 / math.sqrt(3))  # t(.975, 2) s / sqrt(n)
    assert math.isnan(seed_intervals(pd.DataFrame({4: [0.5]})).loc[4, "half"])


def test_tables_hold_means_intervals_and_paired_differences(tmp_path):
    folder = finished(tmp_path / "x")
    definition, records = read_records(folder)
    text = markdown(definition, records)
    assert "| a | 0.400 ± 0.000 (50.0%) | 0.200 ± 0.000 (25.0%) | 10 |" in text
    assert "| b | 0.600 ± 0.248 (75.0%) | 0.200 ± 0.000 (25.0%) | 10 |" in text
    assert "| b - a | +0.200 ± 0.248 | +0.000 ± 0.000 |" in text
    assert "| a - its imitation | **+0.100 ± 0.000** | +0.000 ± 0.000 |" in text
    assert len(results(definition, records)) == 2 * 3 * 2 * 2
    assert "random" not in text  # nothing was measured untrained
    row = {"budget": 4, "mean_tokens": 4.0, "accuracy": 0.2, "ci95": [0.1, 0.3], "seconds": 1.0}
    pruner = {"knowledge": "random", "budgets": [row, row | {"budget": 2, "accuracy": 0.1}]}
    untrained = {"full_accuracy": 0.8, "questions": 100, "pruners": {"random": pruner}}
    text = markdown(definition | {"untrained": {"crowded": untrained}}, records)
    assert "| *random* | 0.200 (25.0%) | 0.100 (12.5%) | |" in text


def test_a_resumed_run_is_marked_with_a_footnote(tmp_path):
    definition, records = read_records(finished(tmp_path / "x"))
    assert "†" not in markdown(definition, records)
    (one,) = [r for r in records if (r["arm"], r["seed"]) == ("b", 1)]
    one["resumed"] = 2
    text = markdown(definition, records)
    assert "| b † |" in text and "| a |" in text and "| b: imitation only |" in text
    assert "† Resumed after an interruption" in text and "would have given: b seed 1 (2 x)." in text
    table = results(definition, records)
    assert set(table[table.resumed > 0].arm) == {"b"} and set(table.resumed) == {0, 2}


def test_files_are_tidy_and_complete(tmp_path):
    folder = write_tables(finished(tmp_path / "x"))
    table = pq.read_table(folder / "results.parquet")
    assert tuple(table.column_names) == RESULTS and len(RESULTS) == 16
    frame = table.to_pylist()
    assert {row["method"] for row in frame} == {"policy", "imitation"}
    chosen = [r for r in frame if (r["arm"], r["seed"], r["method"]) == ("b", 1, "policy")]
    assert [row["accuracy"] for row in chosen] == pytest.approx([0.6, 0.2])
    assert [row["relative"] for row in chosen] == pytest.approx([0.75, 0.25])
    assert len(pq.read_table(folder / "curves.parquet")) == 12
    assert (folder / "crowded-tokens.png").stat().st_size > 5000
    assert (folder / "crowded-scores.png").stat().st_size > 5000
    assert not list(folder.glob("*.tmp"))


def test_a_failed_plot_costs_no_table(tmp_path, monkeypatch, caplog):
    def fails(*args):
        raise OSError("disk full")

    monkeypatch.setattr("tprl_env.evaluation.experiment_plots.plot_budgets", fails)
    folder = write_tables(finished(tmp_path / "x"))
    assert f"{folder / 'crowded-tokens.png'} could not be drawn (OSError: disk full)" in caplog.text
    assert (folder / "crowded-scores.png").is_file() and (folder / "tables.md").is_file()


def test_unfinished_unequal_and_foreign_runs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no experiment in"):
        read_records(tmp_path)
    with pytest.raises(ValueError, match=r"1 of 6 runs .* crowded/b/seed-2"):
        read_records(finished(tmp_path / "x", skip=("crowded/b/seed-2",)))
    with pytest.raises(ValueError, match=r"different numbers of LVLM scores, 1000 \(b\) and 1300"):
        read_records(finished(tmp_path / "y", scores=1300))
    read_records(finished(tmp_path / "z", scores=1200))  # within an iteration
    file = next((tmp_path / "z").glob("runs/*/record.json"))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"key": "other"}))
    with pytest.raises(ValueError, match="record of another run"):
        read_records(tmp_path / "z")


def test_two_experiments_never_share_a_folder(tmp_path):
    first, second = experiment().as_dict(), experiment(seeds=(0, 1)).as_dict()
    check_experiment(first, first, tmp_path)
    with pytest.raises(ValueError, match=r"'small' with other seeds; choose another out"):
        check_experiment(first, second, tmp_path)


def test_definitions_survive_json():
    definition = experiment().as_dict()
    assert json.loads(json.dumps(definition)) == definition
    assert np.isclose(definition["configs"]["b"]["algorithm"]["lr"], 1e-3)


def test_each_new_point_is_reported_also_after_a_resume(monkeypatch):
    reported = []
    monkeypatch.setattr("tprl_env.rllib.experiments.trial.tune.report", reported.append)
    points = [{"lvlm_scores": scores, "accuracy": {"4": 0.5}} for scores in (0, 100, 200)]

    def measure(row, policy):
        points[:] = [point for point in points if point["lvlm_scores"] < row["scores"]]
        if row["scores"] % 100 == 0:
            points.append({"lvlm_scores": row["scores"], "accuracy": {"4": 0.75}})

    names = ("scores", "mean_return", "score", "kept", "scores_per_second", "busy_share")
    hook = reporting_hook(SimpleNamespace(points=lambda: points), measure)
    for scores in (50, 100, 150):  # resumed after the start: two points are undone
        hook(dict.fromkeys(names, 0) | {"scores": scores}, None)
    assert [(row["scores"], row["accuracy_4"]) for row in reported] == [(100, 0.75)]
