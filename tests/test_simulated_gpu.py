"""What runs on a GPU, on simulated ones: no operand on another device, and the CPU's results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from simulated_gpu import simulated_gpus
from torch import Tensor, nn

pytest.importorskip("transformers")

from tprl_env.data.features.store import FeatureStore, open_source
from tprl_env.data.sample import Sample
from tprl_env.evaluation.reducer_names import contenders
from tprl_env.evaluation.reducers import Bench
from tprl_env.inference import PrunedLVLM
from tprl_env.lvlm import load_lvlm
from tprl_env.lvlm.encoding.encode import encode_dataset
from tprl_env.lvlm.encoding.saliency import add_question_attention, add_question_rows
from tprl_env.lvlm.tiny.families import RANDOM_FAMILIES, save_random
from tprl_env.policy import PolicyConfig, PolicyPruner, PruningPolicy
from tprl_env.policy.autoencoder_training import train_autoencoder, write_codes
from tprl_env.policy.demonstrations import saliency_demonstrator
from tprl_env.policy.distributions import ConditionalBernoulli, MaskedBernoulli
from tprl_env.policy.imitation import pretrain
from tprl_env.policy.observations import observe, with_progress
from tprl_env.reducers import REDUCERS, make_reducer
from tprl_env.reducers.layer import LAYER_PRUNERS
from tprl_env.scoring.lvlm_scorer import LVLMScorer

COVERING = ("llava", "qwen3_vl", "llava_next")
"""CLS tower; three rotary axes, DeepStack; tiles, newlines that always stay."""

SIZES = ((40, 70), (28, 28), (90, 33))
QUESTIONS = ("what color is the 7 ?", "yes or no")
TOY = "toy:samples=12,tokens=14,seed=1,vary=1"

# ---------- the simulation itself


def gpu(*shape: int, device: str = "cuda") -> Tensor:
    return torch.ones(*shape, device=device)


class _KeepsAMask(nn.Module):
    """A module with a tensor that is no buffer and stays behind."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.mask = torch.ones(3)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * self.mask


DEFECTS: dict[str, Callable[[], Any]] = {
    "added to a tensor on the CPU": lambda: gpu(3) + torch.ones(3),
    "a mask made without a device": lambda: gpu(3).masked_fill(torch.zeros(3).bool(), 0),
    "places made without a device": lambda: gpu(3).index_select(0, torch.arange(2)),
    "gathered by places on the CPU": lambda: gpu(2, 3).gather(1, torch.zeros(2, 1).long()),
    "rows from numpy": lambda: torch.cat([gpu(2), torch.from_numpy(np.ones(2, np.float32))]),
    "written into a tensor on the CPU": lambda: torch.ones(3).index_copy_(
        0, torch.tensor([1]), gpu(1)
    ),
    "a choice on the CPU": lambda: torch.where(torch.ones(3) > 0, gpu(3), gpu(3)),
    "two GPUs": lambda: gpu(3) * gpu(3, device="cuda:1"),
    "a view of a tensor on the CPU": lambda: gpu(3) + torch.ones(2, 3)[1],
    "what a module keeps to itself": lambda: _KeepsAMask().to("cuda")(gpu(3)),
    "in a backward pass": lambda: _BackwardOnTheCpu.apply(gpu(3).requires_grad_()).sum().backward(),
    "matrices": lambda: torch.ones(2, 3) @ gpu(3, 2),
    "numpy of a GPU's tensor": lambda: gpu(3).numpy(),
    "np.asarray of a GPU's tensor": lambda: np.asarray(gpu(3)),
    "a CPU generator": lambda: torch.rand(
        3, device="cuda", generator=torch.Generator().manual_seed(0)
    ),
    "a GPU that is not there": lambda: gpu(3, device="cuda:2"),
}


class _BackwardOnTheCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * torch.ones(3, device="cpu")


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_found(name: str) -> None:
    with simulated_gpus(2), pytest.raises((RuntimeError, TypeError), match=r"devic|numpy|ordinal"):
        DEFECTS[name]()


def test_what_cuda_allows_is_allowed() -> None:
    with simulated_gpus(2):
        one = gpu(2, 3)
        assert one.device == torch.device("cuda:0") and one.is_cuda and not torch.ones(1).is_cuda
        assert (one + torch.tensor(2.0)).device == one.device  # a single value on the CPU
        assert one[torch.tensor([1])].device == one.device  # CPU indices
        assert one.new_zeros(3).device == torch.zeros_like(one).device == one.device
        assert one.clone().view(-1)[2:].device == one.device
        assert one.cpu().numpy().shape == (2, 3) and one.sum().item() == 6
        moved = one.to("cuda:1")
        assert moved.device == torch.device("cuda:1") and one.to(moved).device == moved.device
        moved[0] = one[0].to(moved.device)
        assert moved.copy_(torch.zeros(2, 3)).device == torch.device("cuda:1")  # copies may cross
        with torch.device("cuda:1"):
            assert torch.arange(3).device == torch.device("cuda:1")
        layer = nn.Linear(3, 2).to("cuda")
        layer(one).sum().backward()
        assert layer.weight.grad is not None and layer.weight.grad.is_cuda
        torch.optim.AdamW(layer.parameters()).step()
        assert {p.device for p in layer.parameters()} == {one.device}
        drawn = torch.rand(3, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
        assert drawn.is_cuda and torch.as_tensor(np.ones(3), device="cuda").is_cuda
    assert not one.is_cuda and not torch.cuda.is_available()


# ---------- every family


class Case:
    """A random checkpoint, three pictures with two questions each, and their store."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, save_random(name, folder / "lvlm")
        rng = np.random.default_rng(0)
        self.pictures = [rng.integers(0, 255, (*s, 3), dtype=np.uint8) for s in SIZES]
        self.samples = [
            Sample(f"{n}-{t}", picture, question, ("yes", "red"), image_id=str(n))
            for n, picture in enumerate(self.pictures)
            for t, question in enumerate(QUESTIONS)
        ]
        self.store = folder / "store"
        self.cpu = self.everything(folder / "store")

    def everything(self, out: Path, **where: Any) -> SimpleNamespace:
        """Encoding, maps, codes, scores of every kind, texts."""
        lvlm: Any = load_lvlm(self.folder, dtype="float32", **where)
        encode_dataset(lvlm, self.samples, out, progress=False)
        store = FeatureStore.open(out)
        add_question_attention(store, lvlm)
        add_question_rows(store, lvlm, layer=1)
        autoencoder, _ = train_autoencoder(store, code_width=8, steps=3)
        write_codes(store, autoencoder)
        store = FeatureStore.open(out)
        numbers = np.arange(len(store))
        exists = store.exists(numbers)
        keep = exists & (np.random.default_rng(1).random(exists.shape) < 0.5)
        scorer = LVLMScorer(lvlm, store, "likelihood")
        lives = np.where(keep, np.where(np.arange(keep.shape[1]) % 2, 4, 2), 0).astype(np.uint8)
        inside = {
            name: scorer.score_inside(numbers, reducer=make_reducer(name)) for name in LAYER_PRUNERS
        }
        visuals = lvlm.encode_images(self.pictures[:2])
        prompts = [lvlm.prompt(q, [v]) for q, v in zip(QUESTIONS, visuals, strict=True)]
        tokens = [v.tokens for v in visuals]
        masks = [np.arange(len(t)) % 2 == 0 for t in tokens]
        self.count = int(exists[0].sum())
        return SimpleNamespace(
            lvlm=lvlm,
            store=store,
            autoencoder=autoencoder,
            full=store.full_scores("likelihood"),
            masked=scorer(numbers, keep),
            lived=scorer.score_inside(numbers, lives=lives).likelihood,
            inside={name: (one.likelihood, one.lives) for name, one in inside.items()},
            map=np.concatenate([store.channel("question_attention", int(i)) for i in numbers]),
            written=lvlm.generate_ids(prompts, tokens, masks, 4),
            without=lvlm.generate_ids(prompts, tokens, [m & False for m in masks], 2),
        )

    def reduced(self, one: SimpleNamespace) -> dict[str, Any]:
        """Text and lives of one question with every reducer, or why the family refuses it."""
        found: dict[str, Any] = {}
        reducers: dict[str, Any] = {f"{name} before": cls() for name, cls in REDUCERS.items()}
        for name in ("cdpruner", "trim"):
            reducers[f"{name} before"] = make_reducer(name, relevance="query")
        reducers |= {name: cls() for name, cls in LAYER_PRUNERS.items()}
        del reducers["oracle before"]  # knows labels
        config = PolicyConfig.question_aware(8, one.lvlm.query_width, width=16)
        torch.manual_seed(0)
        reducers["policy"] = PolicyPruner(PruningPolicy(config).to(one.lvlm.device))
        for name, reducer in reducers.items():
            pruned = PrunedLVLM(one.lvlm, reducer, one.autoencoder)
            budget = self.count * 3 // 4 if name in LAYER_PRUNERS else 4
            try:
                answer = pruned.answer_batch(self.pictures[:1], QUESTIONS[:1], budget, 2)[0]
                found[name] = (answer.text, answer.lives.tolist())
            except ValueError as error:
                found[name] = str(error)
        refused = {name: why for name, why in found.items() if isinstance(why, str)}
        assert not (refused if self.name in ("llava", "llava_mistral") else len(refused) > 15), (
            refused
        )
        return found


def make_case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


case = pytest.fixture(
    make_case,
    scope="module",
    params=[
        pytest.param(name, marks=[] if name in COVERING else pytest.mark.slow)
        for name in RANDOM_FAMILIES
    ],
)


def test_a_gpu_encodes_scores_and_writes_what_the_cpu_does(case: Case, tmp_path: Path) -> None:
    with simulated_gpus():
        found = case.everything(tmp_path / "store")
        assert found.lvlm.device == torch.device("cuda:0")
        assert {p.device.type for p in found.lvlm._model.parameters()} == {"cuda"}
    equal(found, case.cpu)


def test_a_model_over_two_gpus_does_what_one_does(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the simulation knows one thread
    with simulated_gpus(2):
        found = case.everything(tmp_path / "store", device_map="auto")
        used = [p.device.index for p in found.lvlm.model.parameters()]
        assert set(used) == {0, 1}
    equal(found, case.cpu)


def equal(found: SimpleNamespace, cpu: SimpleNamespace) -> None:
    for name in ("full", "masked", "lived", "map"):
        wanted = getattr(cpu, name)
        np.testing.assert_allclose(getattr(found, name), wanted, rtol=1e-5, err_msg=name)
    for name, (likelihood, lives) in cpu.inside.items():
        np.testing.assert_allclose(found.inside[name][0], likelihood, rtol=1e-5, err_msg=name)
        assert (found.inside[name][1] == lives).all(), name
    assert (found.written, found.without) == (cpu.written, cpu.without)


@pytest.mark.parametrize("count", [1, 2])
def test_every_reducer_leaves_on_gpus_what_it_leaves_on_the_cpu(
    case: Case, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    wanted = case.reduced(case.cpu)
    with simulated_gpus(count):
        where = tower_and_head_apart(case.cpu.lvlm.model) if count == 2 else None
        lvlm = load_lvlm(case.folder, dtype="float32", device_map=where)
        autoencoder = case.cpu.autoencoder.to("cuda")
        found = case.reduced(SimpleNamespace(lvlm=lvlm, autoencoder=autoencoder))
    case.cpu.autoencoder.to("cpu")
    assert found == wanted


def tower_and_head_apart(model: Any) -> dict[str, int]:
    """The second GPU for everything but the language model."""
    inner = [*model.model._modules, *model.model._parameters]
    return {"lm_head": 1} | {f"model.{one}": int("language" not in one) for one in inner}


def measured(store: FeatureStore, lvlm: Any, budget: int) -> list[Any]:
    bench = Bench(store, lvlm, np.arange(4))
    chosen = contenders(["visionzip", "tome", "divprune", "pact"])
    return [row for one in chosen for row in bench.measure(one, [budget])]


def test_reducers_are_measured_on_a_gpu_as_on_the_cpu(case: Case) -> None:
    store, budget = case.cpu.store, 12
    with simulated_gpus():
        found = measured(store, load_lvlm(case.folder, dtype="float32"), budget)
    for one, wanted in zip(found, measured(store, case.cpu.lvlm, budget), strict=True):
        assert one.row.get("reason") == wanted.row.get("reason")
        assert np.array_equal(one.lives, wanted.lives) and np.array_equal(one.scores, wanted.scores)


# ---------- the policy


def close(found: Any, wanted: Any) -> None:
    """Equal up to rounding, wherever they are."""
    torch.testing.assert_close(found.detach().cpu(), wanted.detach().cpu(), rtol=1e-4, atol=1e-5)


def toy_policy(device: str) -> PruningPolicy:
    torch.manual_seed(0)
    source = open_source(TOY)
    config = PolicyConfig.question_aware(source.code_width, source.query_width, width=16)
    return PruningPolicy(config).to(device)


def imitated(device: str) -> tuple[PruningPolicy, float]:
    source, policy = open_source(TOY), toy_policy(device)
    demonstrator = saliency_demonstrator(source, REDUCERS["oracle"](), 2, 6)
    return policy, pretrain(policy, source, demonstrator, steps=3, batch_size=4).agreement


def test_a_policy_imitates_on_a_gpu_as_on_the_cpu(tmp_path: Path) -> None:
    wanted, agreement = imitated("cpu")
    with simulated_gpus():
        found, shares = imitated("cuda")
        assert {p.device.type for p in found.parameters()} == {"cuda"}
        found.save_pretrained(tmp_path)
        again = PruningPolicy.from_pretrained(tmp_path, device="cuda")
        assert again.device.type == "cuda"
    assert shares == pytest.approx(agreement)
    for one, other in zip(found.parameters(), wanted.parameters(), strict=True):
        close(one, other)


def judged(device: str, exact: bool) -> list[Tensor]:
    """Everything that a learner asks of a distribution, and gradients of the policy."""
    source, policy = open_source(TOY), toy_policy(device)
    rows = np.arange(6)
    obs = observe(source, rows, policy.config, device=policy.device)
    alive = torch.from_numpy(source.exists(rows)).to(policy.device)
    output = policy(with_progress(obs, alive=alive, step=0, budget=4))
    logits, count = output.logits, torch.full((6,), 4, device=policy.device)
    made: Any = (
        ConditionalBernoulli(logits, alive, count)
        if exact
        else MaskedBernoulli(logits, alive, 0.5, 0.9)
    )
    other: Any = (
        ConditionalBernoulli(logits.detach() + 0.1 * alive, alive, count)
        if exact
        else MaskedBernoulli(logits.detach() + 0.1, alive, 0.5, 0.9)
    )
    drawn = made.sample(torch.Generator(policy.device).manual_seed(1))
    log_prob, entropy, kl = made.log_prob(drawn), made.entropy(), made.kl(other)
    (log_prob + entropy + kl + output.value.square()).sum().backward()
    optimizer = torch.optim.Adam(policy.parameters())
    nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    rest = [made.inclusion_probabilities()] if exact else [made.token_log_prob(drawn)]
    found = [drawn.float(), log_prob, entropy, kl, made.mode().float(), *rest]
    return [*found, *(p for p in policy.parameters())]


@pytest.mark.parametrize("exact", [True, False])
def test_both_distributions_and_their_gradients(exact: bool) -> None:
    wanted = judged("cpu", exact)
    with simulated_gpus():
        found = judged("cuda", exact)
        assert {one.device.type for one in found} == {"cuda"}
    for one, other in zip(found, wanted, strict=True):
        close(one, other)


def test_the_module_of_rllib_acts_and_learns() -> None:
    pytest.importorskip("ray")
    from gymnasium.spaces import MultiBinary
    from ray.rllib.core.columns import Columns
    from ray.rllib.core.rl_module.rl_module import RLModuleSpec

    from tprl_env.rllib.rollout.module import TokenPruningModule

    source = open_source(TOY)
    config = PolicyConfig.question_aware(source.code_width, source.query_width, width=16)
    options = {
        **{"policy": asdict(config), "distribution": "exact", "discount": 1.0, "max_steps": 2},
        **{"source": TOY, "seed": 0, "load": None},
    }
    with simulated_gpus():
        spec = RLModuleSpec(
            module_class=TokenPruningModule,
            observation_space=MultiBinary(14),
            action_space=MultiBinary(14),
            model_config=options,
        )
        built: Any = spec.build().to("cuda")
        numbers = torch.tensor([1, 2, 2])
        obs = {
            "sample": numbers,
            "alive": torch.from_numpy(source.exists(numbers.numpy())),
            "step": torch.zeros(3, 1),
            "budget": torch.full((3, 1), 4.0),
            "state": torch.tensor([0, 1, 1]),
        }
        obs = {name: part.to("cuda") for name, part in obs.items()}
        acted = built.act(obs)
        assert acted.actions.is_cuda and built.generator.device.type == "cuda"
        outputs = built._forward_train({Columns.OBS: obs})
        made = built.action_dist_cls.from_logits(outputs[Columns.ACTION_DIST_INPUTS])
        (made.logp(acted.actions) + made.entropy()).sum().backward()
        used = [p for p in built.parameters() if p.grad is not None]
        assert used and all(p.grad is not None and p.grad.is_cuda for p in used)
