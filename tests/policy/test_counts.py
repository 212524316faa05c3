"""A policy that chooses how many: the rule by hand, fitting on the toy, folders, and refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tprl_env.data.features.store import open_source
from tprl_env.data.features.toy import ToyScorer, ToyStore
from tprl_env.policy import PolicyConfig, PolicyPruner, PruningPolicy
from tprl_env.policy.count_fitting import CountFit, curves, fit_counts
from tprl_env.policy.counts import (
    FOLDER,
    CountConfig,
    CountHead,
    CountPruner,
    count_features,
    load_head,
)
from tprl_env.policy.observations import observe
from tprl_env.policy.weights import weights_digest
from tprl_env.reducers import prune_inputs

TOY = "toy:samples=64,tokens=16,seed=1,vary=1"


def policy_of(source: ToyStore, seed: int = 0) -> PruningPolicy:
    torch.manual_seed(seed)
    return PruningPolicy(
        PolicyConfig.question_aware(source.code_width, source.query_width, width=16)
    )


class _Fixed(CountHead):
    """A head whose values are given."""

    def __init__(self, values: list[list[float]], counts: tuple[int, ...]) -> None:
        super().__init__(CountConfig(counts, 4, 8, 12, "x"))
        self.values = torch.tensor(values)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.logit(self.values)


def test_the_rule_by_hand() -> None:
    # v - price k / N of 1, 2, 4 of 8 tokens: at .8 it is .5-.1, .7-.2, .9-.4
    head = _Fixed([[0.5, 0.7, 0.9], [0.6, 0.65, 0.7]], (1, 2, 4))
    features, number = torch.zeros(2, 4), torch.tensor([8, 8])
    assert head.choose(features, number, 0.0).tolist() == [4, 4]
    assert head.choose(features, number, 0.4).tolist() == [4, 1]  # .7; .55 against .55 and .5
    assert head.choose(features, number, 0.9).tolist() == [2, 1]  # .3875, .475, .45
    assert head.choose(features, number, 9.0).tolist() == [1, 1]
    assert head.choose(features, torch.tensor([3, 1]), 0.0).tolist() == [2, 1]  # rows with fewer


@pytest.fixture(scope="module")
def source() -> ToyStore:
    found = open_source(TOY)
    assert isinstance(found, ToyStore)
    return found


@pytest.fixture(scope="module")
def fitted(source: ToyStore) -> tuple[PruningPolicy, CountHead, dict]:
    policy = policy_of(source)
    settings = CountFit(counts=(1, 2, 4, 8, 99), questions=64, steps=60, batch_size=32)
    scorer = ToyScorer(source, "likelihood")
    head, report = fit_counts(policy, source, scorer, settings)
    return policy, head, report


def test_curves_are_those_of_the_policys_own_choice(source: ToyStore) -> None:
    policy, samples = policy_of(source), np.arange(10)
    found = curves(policy, source, ToyScorer(source, "likelihood"), samples, (2, 5))
    for column, count in enumerate((2, 5)):
        for row in samples.tolist():
            inputs = prune_inputs(source, row)
            mask = PolicyPruner(policy).prune(inputs, min(count, inputs.num_tokens))
            keep = np.zeros((1, source.max_tokens), bool)
            keep[0, : len(mask)] = mask
            wanted = ToyScorer(source, "likelihood")(np.array([row]), keep)
            assert found[row, column] == pytest.approx(float(wanted[0]))


def test_a_fit_is_repeatable_and_reports_what_it_took(
    source: ToyStore, fitted: tuple[PruningPolicy, CountHead, dict]
) -> None:
    policy, head, report = fitted
    assert head.config.counts == (1, 2, 4, 8)  # 99 is beyond the source
    assert report["scores"] == 64 * 4 and report["mean_curve"] == sorted(report["mean_curve"])
    settings = CountFit(counts=(1, 2, 4, 8), questions=64, steps=60, batch_size=32)
    again, _ = fit_counts(policy, source, ToyScorer(source, "likelihood"), settings)
    for one, other in zip(head.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    obs = observe(source, np.arange(64), policy.config)
    with torch.no_grad():
        values = head(count_features(policy, obs, 12)).sigmoid()
    target = curves(policy, source, ToyScorer(source, "likelihood"), np.arange(64), (1, 2, 4, 8))
    assert np.abs(values.numpy() - target).mean() < np.abs(target.mean(0) - target).mean()


def test_a_price_is_found_for_a_mean(
    source: ToyStore, fitted: tuple[PruningPolicy, CountHead, dict]
) -> None:
    policy, head, _ = fitted
    pruner = CountPruner(policy, head=head)
    assert not pruner.exact
    with pytest.raises(ValueError, match="there is no price"):
        pruner.prune(prune_inputs(source, 0), 3)
    found = pruner.calibrate(source, 4)
    assert found.price is not None and found.price > 0
    assert found.calibration is not None and abs(found.calibration.mean_kept - 4) < 0.5
    masks = found.prune_batch([prune_inputs(source, row) for row in range(64)], 1)
    kept = [int(mask.sum()) for mask in masks]
    assert np.mean(kept) == pytest.approx(found.calibration.mean_kept) and len(set(kept)) > 1
    row = int(np.argmax(kept))
    same = PolicyPruner(policy).prune(prune_inputs(source, row), kept[row])
    assert torch.equal(masks[row], same)  # exactly the top that many
    cheaper = replace(found, price=found.price / 4)
    more = cheaper.prune_batch([prune_inputs(source, row) for row in range(64)], 1)
    assert sum(int(m.sum()) for m in more) > sum(kept)
    with pytest.raises(ValueError, match=r"out of this head's reach here, 1 to "):
        pruner.calibrate(source, 16)
    near = pruner.calibrate(source, 16, nearest=True)
    assert near.calibration is not None and near.calibration.mean_kept < 16


def test_a_head_is_saved_with_its_policy(
    tmp_path: Path, fitted: tuple[PruningPolicy, CountHead, dict], source: ToyStore
) -> None:
    policy, head, _ = fitted
    policy.save_pretrained(tmp_path / "policy")
    with pytest.raises(ValueError, match="has no count head; fit one with `tprl fit-counts"):
        CountPruner.of_folder(tmp_path / "policy")
    head.save_pretrained(tmp_path / "policy" / FOLDER)
    again = CountPruner.of_folder(tmp_path / "policy", price=0.3)
    first = CountPruner(policy, head=head, price=0.3)
    inputs = [prune_inputs(source, row) for row in range(8)]
    for one, other in zip(again.prune_batch(inputs, 1), first.prune_batch(inputs, 1), strict=True):
        assert torch.equal(one, other)
    assert weights_digest(policy) == head.config.policy
    policy_of(source, seed=5).save_pretrained(tmp_path / "policy")
    with pytest.raises(ValueError, match="was fitted to another policy; fit one"):
        load_head(tmp_path / "policy", PruningPolicy.from_pretrained(tmp_path / "policy"))
    from tprl_env.cli import main

    assert main(["verify", str(tmp_path / "policy")]) == 2


def test_what_cannot_be_is_refused(
    source: ToyStore, fitted: tuple[PruningPolicy, CountHead, dict]
) -> None:
    policy, head, _ = fitted
    with pytest.raises(ValueError, match="without a count head cannot choose"):
        CountPruner(policy)
    for price in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="price must be finite and at least 0"):
            CountPruner(policy, head=head, price=price)
    with pytest.raises(ValueError, match="one pass, mode='topk'"):
        CountPruner(policy, head=head, mode="threshold", threshold=0.5)
    for counts in ((), (2, 1), (0, 3), (1, 1)):
        with pytest.raises(ValueError, match="counts must grow"):
            CountConfig(counts, 3, 3, 3, "")
    with pytest.raises(ValueError, match="at least 20 questions"):
        fit_counts(policy, source, ToyScorer(source), CountFit(questions=3))
