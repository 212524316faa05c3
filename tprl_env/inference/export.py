"""From a training run to a pruner that can be used and published."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tprl_env.checks import check_fields, quoted
from tprl_env.data.features.store import FeatureStore
from tprl_env.env.budgets import Budget
from tprl_env.evaluation.result_files import RESULTS_NAME, read_results
from tprl_env.evaluation.results import TRAINING_NAME, check_training
from tprl_env.inference.origin import Origin
from tprl_env.policy.autoencoder import TokenAutoencoder
from tprl_env.policy.network import PruningPolicy
from tprl_env.policy.pruner import PolicyPruner

if TYPE_CHECKING:
    from tprl_env.inference.token_pruner import TokenPruner

_SHOWN = ("name", "knowledge", "budget", "mean_tokens", "accuracy", "ci95")


def read_run(
    run: str | Path,
    results: str | Path | None,
    budget: Budget | None,
    lvlm: Any,
    autoencoder: str | Path | None,
    settings: Mapping[str, Any],
) -> TokenPruner:
    """The policy of a run and what it was trained on; see :meth:`TokenPruner.from_run`."""
    from tprl_env.inference.token_pruner import TokenPruner
    from tprl_env.lvlm import load_lvlm
    from tprl_env.lvlm.processed.identity import model_signature
    from tprl_env.lvlm.processed.question import QuestionFrame

    folder = Path(run).expanduser()
    config = _read_object(folder / "config.json", "a run of `tprl train`")
    training = _read_object(folder / "policy" / TRAINING_NAME, "the record of a training")
    check_training(training, str(folder / "policy" / TRAINING_NAME))
    source, name = config.get("source"), config.get("lvlm")
    if not source or not Path(str(source)).is_dir() or not name:
        raise FileNotFoundError(
            f"the run in {folder} was trained on {quoted(source)} with the LVLM {quoted(name)}; "
            f"a pruner needs a feature store that is still there, and an LVLM"
        )
    store = FeatureStore.open(str(source))
    manifest = store.manifest
    network = PruningPolicy.from_pretrained(folder / "policy")
    check_fields("PolicyPruner", PolicyPruner, {"policy": network, **settings})
    policy = PolicyPruner.as_trained(network, **dict(settings))
    encoder = _autoencoder(store, autoencoder)
    loaded = load_lvlm(str(name)) if lvlm is None else lvlm
    if loaded.fingerprint != manifest.lvlm_fingerprint:
        raise ValueError(
            f"the store {source} was encoded by {manifest.lvlm} "
            f"({manifest.lvlm_fingerprint}), the LVLM {str(name)!r} is now "
            f"{loaded.fingerprint}; restore its folder"
        )
    rules = config.get("rules")
    trained = rules.get("budget") if isinstance(rules, Mapping) else config.get("budget")
    budgets = _numbers(trained)
    rows, data = _measured(results, training)
    origin = Origin(
        lvlm=str(name),
        lvlm_fingerprint=manifest.lvlm_fingerprint,
        lvlm_signature=model_signature(loaded.model),
        model_type=manifest.model_type or loaded.model.config.model_type,
        dataset=manifest.dataset,
        dataset_fingerprint=manifest.dataset_fingerprint,
        samples=manifest.samples,
        budgets=budgets,
        visual_tokens=manifest.max_tokens,
        training=training,
        results=rows,
        evaluated_on=data,
    )
    wanted = budget if budget is not None else max(budgets, default=None)
    return TokenPruner(policy, encoder, wanted, QuestionFrame.of(loaded), origin)


def _autoencoder(store: FeatureStore, folder: str | Path | None) -> TokenAutoencoder:
    """The autoencoder that made the codes that the policy was trained on."""
    place = store.path / "autoencoder" if folder is None else Path(folder).expanduser()
    if not place.is_dir():
        raise FileNotFoundError(
            f"there is no autoencoder in {place}; pass the folder of the one that made the codes "
            f"of {store.path} as autoencoder="
        )
    found = TokenAutoencoder.from_pretrained(place)
    wanted = store.channel_meta("codes")["fingerprint"]
    if found.fingerprint != wanted:
        raise ValueError(
            f"the autoencoder in {place} is another ({found.fingerprint}) than the one that made "
            f"the codes of {store.path} ({wanted}), on which the policy was trained; pass that "
            f"one's folder as autoencoder="
        )
    return found


def _numbers(budget: object) -> tuple[int | float, ...]:
    """Counts or shares of a configuration's budget; empty where it has none."""
    parts = budget if isinstance(budget, (list, tuple)) else [budget]
    return tuple(
        part for part in parts if isinstance(part, (int, float)) and not isinstance(part, bool)
    )


def _measured(
    results: str | Path | None, training: Mapping[str, Any]
) -> tuple[tuple[dict[str, Any], ...], str]:
    """Rows about the policy, all tokens first, and what they were measured on."""
    if results is None:
        return (), ""
    path = Path(results)
    content = read_results(path / RESULTS_NAME if path.is_dir() else path)
    if content["training"] != training:
        raise ValueError(
            f"{path} is about another policy: its training is {quoted(content['training'])}, the "
            f"run's is {quoted(training)}; evaluate this policy with `tprl evaluate --policy`"
        )
    full = content["full"]
    count = content["visual_tokens"]
    first = {
        **{"name": "all tokens", "knowledge": "heuristic", "budget": count, "mean_tokens": count},
        **{"accuracy": full["accuracy"], "ci95": full["ci95"]},
    }
    rows = [row for row in content["methods"] if row["knowledge"] == "policy"]
    chosen = ({name: row[name] for name in _SHOWN} for row in [first, *rows])
    return tuple(chosen), f"{content['task']}, {full['questions']} questions"


def _read_object(path: Path, what: str) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; give the folder of {what}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no valid JSON ({error}); export the policy again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object, got {quoted(content)}")
    return content
