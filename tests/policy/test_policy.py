"""The policy against its equations, its invariances, and its files."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tprl_env.policy.network import DEAD_LOGIT, PolicyConfig, PruningPolicy
from tprl_env.policy.weights import save_weights

CONFIGS = {
    "paper": PolicyConfig(8, 6),
    "two layers": PolicyConfig(8, 6, layers=2, width=12, hidden=5),
    "mlp": PolicyConfig(8, 6, architecture="mlp"),
    "gated": PolicyConfig(8, 6, width=16, fusion="gated", query_norm="layer", query_scale=0.3),
    "question": PolicyConfig.question_aware(8, 6, width=16),
    "everything": PolicyConfig.question_aware(
        8, 6, width=16, fusion="gated", step_input=True, value_input_detach=True, initial_keep=0.9
    ),
}


def build(config, seed=0):
    torch.manual_seed(seed)
    return PruningPolicy(config).double().eval()


def observation(config, batch=3, tokens=7, question=4, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    alive = torch.rand(batch, tokens, generator=generator) > 0.3
    alive[:, 0] = True
    obs = {
        "tokens": normal(batch, tokens, config.token_width),
        "alive": alive.to(torch.int8),
        "step": torch.tensor([[0.0], [1.0], [2.0]])[:batch],
        "budget": torch.tensor([[1.0], [2.0], [5.0]])[:batch],
    }
    if config.query == "tokens":
        mask = torch.ones(batch, question, dtype=torch.int8)
        mask[0, -1] = 0
        obs |= {"query": normal(batch, question, config.query_width), "query_mask": mask}
    else:
        obs["query"] = normal(batch, config.query_width)
    return obs


# ------------------------------------------------------------- literal: the paper's equations


def layer_norm(x, eps=1e-5):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class Equations:
    """TPRL eq. 9-18 for one image in numpy, weights read by name."""

    def __init__(self, policy):
        self.weights = {k: v.detach().numpy() for k, v in policy.state_dict().items()}

    def linear(self, name, x):
        y = x @ self.weights[name + ".weight"].T
        return y + self.weights[name + ".bias"] if name + ".bias" in self.weights else y

    def attention(self, x, heads):
        width = x.shape[1] // heads
        q, k, v = np.split(self.linear("blocks.0.qkv", x), 3, axis=1)
        mixed = np.zeros_like(x)
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            scores = q[:, part] @ k[:, part].T / math.sqrt(width)
            mixed[:, part] = softmax(scores) @ v[:, part]
        return layer_norm(x + self.linear("blocks.0.out", mixed))

    def head(self, name, f, wide=None):
        inner = gelu(self.linear(name + ".inner", f if wide is None else wide))
        return self.linear(name + ".score", layer_norm(f + self.linear(name + ".outer", inner)))


def test_the_papers_equations_number_by_number():
    config = PolicyConfig(8, 6, heads=4)
    policy, obs = build(config), observation(config, batch=1)
    obs["alive"][:] = 1
    out, e = policy(obs), Equations(policy)
    z, query = obs["tokens"][0].numpy(), obs["query"].numpy()
    x = np.concatenate([z, e.linear("query_in", query)])  # eq. 9: the codes as they are
    f = e.attention(x, 4)[:-1]
    assert np.allclose(out.logits[0].detach().numpy(), e.head("actor", f)[:, 0], atol=1e-12)
    assert np.allclose(out.value.item(), e.head("critic", f.mean(0)).item(), atol=1e-12)


def test_weights_set_by_hand():
    """Every matrix is zero except the output: log-odds are w . LayerNorm(LayerNorm(z)) + b."""
    policy = build(PolicyConfig(2, 1, heads=1))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
        for module in policy.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.fill_(1.0)
        policy.actor.score.weight.copy_(torch.tensor([[3.0, 1.0]]))
        policy.actor.score.bias.fill_(0.5)
        policy.critic.score.bias.fill_(-2.0)
    obs = {
        "tokens": torch.tensor([[[4.0, 2.0], [1.0, 9.0]]], dtype=torch.float64),
        "alive": torch.ones(1, 2),
        "query": torch.zeros(1, 1),
    }
    out = policy(obs)  # LayerNorm of two numbers is (+1, -1) or (-1, +1) up to eps
    assert torch.allclose(out.logits, torch.tensor([[2.5, -1.5]], dtype=torch.float64), atol=1e-4)
    assert out.value.tolist() == [-2.0]


def test_question_match_gate_and_budget_number_by_number():
    config = PolicyConfig(
        8, 6, width=16, query="tokens", question_heads=2, fusion="gated", budget=True,
        token_norm=True, query_norm="rms", query_scale=0.5, value_query=True,
    )  # fmt: skip
    policy, obs = build(config), observation(config, batch=1, tokens=5, question=3)
    obs["alive"][:], obs["query_mask"] = 1, torch.tensor([[1, 1, 0]])
    out, e = policy(obs), Equations(policy)
    z = layer_norm(obs["tokens"][0].numpy())
    asked = obs["query"][0, :2].numpy()
    asked = asked / np.sqrt((asked**2).mean(1, keepdims=True)) * 0.5
    keys = e.linear("match.token_key", z).reshape(5, 2, 16)
    asks = e.linear("match.question_key", asked).reshape(2, 2, 16)
    scores = np.einsum("nhd,qhd->nhq", keys, asks) / 4
    pooled = np.concatenate([scores.max(-1), np.log(np.exp(scores).sum(-1))], axis=1)
    condition = e.linear("condition", np.array([math.log(1.0 / 5.0)]))
    x = e.linear("token_in", z) + e.linear("match.out", pooled) + condition
    mean = asked.mean(0)
    f = e.attention(np.concatenate([x, [e.linear("query_in", mean) + condition]]), 4)[:-1]
    gate = gelu(e.linear("gate_token", z) * e.linear("gate_query", mean))
    logits = e.head("actor", f, np.concatenate([f, gate], axis=1))[:, 0]
    value = e.head("critic", f.mean(0) + condition + e.linear("value_query", mean))
    assert np.allclose(out.logits[0].detach().numpy(), logits, atol=1e-10)
    assert np.allclose(out.value.item(), value.item(), atol=1e-10)


# ---------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("name", CONFIGS)
def test_dead_tokens_change_nothing(name):
    policy, obs = build(CONFIGS[name]), observation(CONFIGS[name])
    dead = obs["alive"] == 0
    changed = dict(obs, tokens=torch.where(dead[..., None], 100.0, obs["tokens"]))
    one, two = policy(obs), policy(changed)
    assert torch.equal(one.logits, two.logits) and torch.equal(one.value, two.value)
    assert (one.logits[dead] == DEAD_LOGIT).all() and (one.logits[~dead] > -1e6).all()
    padded = dict(
        obs,
        tokens=torch.nn.functional.pad(obs["tokens"], (0, 0, 0, 4)),
        alive=torch.nn.functional.pad(obs["alive"], (0, 4)),
    )
    three = policy(padded)
    assert torch.allclose(three.logits[:, :7], one.logits, atol=1e-12)
    assert torch.allclose(three.value, one.value, atol=1e-12)
    assert torch.equal(policy.logits(obs), one.logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_order_of_tokens_is_followed(name):
    policy, obs = build(CONFIGS[name]), observation(CONFIGS[name])
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    moved = dict(obs, tokens=obs["tokens"][:, order], alive=obs["alive"][:, order])
    one, two = policy(obs), policy(moved)
    assert torch.allclose(one.logits[:, order], two.logits, atol=1e-12)
    assert torch.allclose(one.value, two.value, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_exist_and_are_finite_without_tokens(name):
    policy, obs = build(CONFIGS[name]), observation(CONFIGS[name])
    obs["alive"][0] = 0
    if "query_mask" in obs:
        obs["query_mask"][1] = 0
    out = policy(obs)
    (out.logits[obs["alive"] == 1].sum() + out.value.sum()).backward()
    for key, parameter in policy.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


def test_masked_and_unmasked_attention_agree():
    config = PolicyConfig(8, 6)
    policy, obs = build(config), observation(config)
    obs["alive"][:] = 1
    longer = dict(
        obs,
        tokens=torch.nn.functional.pad(obs["tokens"], (0, 0, 0, 1), value=3.0),
        alive=torch.nn.functional.pad(obs["alive"], (0, 1)),
    )
    assert torch.allclose(policy(obs).logits, policy(longer).logits[:, :7], atol=1e-12)


def test_conditioning_reaches_actor_and_critic():
    config = PolicyConfig(8, 6, budget=True, step_input=True)
    policy, obs = build(config), observation(config)
    base = policy(obs)
    for key in ("budget", "step"):
        other = policy({**obs, key: 2 - obs[key] if key == "step" else obs[key] + 2})
        assert not torch.allclose(other.logits[0], base.logits[0])
        assert not torch.allclose(other.value[0], base.value[0])


def test_detached_critic_leaves_the_trunk_alone():
    for detach in (True, False):
        config = PolicyConfig(8, 6, budget=True, value_input_detach=detach)
        policy = build(config)
        policy(observation(config)).value.sum().backward()
        touched = {k for k, p in policy.named_parameters() if p.grad is not None}
        assert {k for k in touched if k.startswith("critic.")}
        assert bool({k for k in touched if not k.startswith("critic.")}) is not detach


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("scale", [0.02, 50.0])
def test_normalised_queries_do_not_depend_on_the_llms_scale(norm, scale):
    config = PolicyConfig(8, 6, query_norm=norm)
    policy, obs = build(config), observation(config)
    scaled = dict(obs, query=obs["query"] * scale)
    assert torch.allclose(policy(obs).logits, policy(scaled).logits, atol=2e-4)


def test_initial_keep_and_size():
    config = PolicyConfig(64, 128)
    assert 80_000 < sum(p.numel() for p in PruningPolicy(config).parameters()) < 140_000
    with torch.no_grad():
        out = build(dataclasses.replace(CONFIGS["paper"], initial_keep=0.9))(
            observation(CONFIGS["paper"])
        )
    mean = out.logits[out.logits > -1e6].mean().item()
    assert abs(mean - math.log(9.0)) < 1.0


# -------------------------------------------------------------------------- errors and files


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token_width": 0}, "token_width must be an integer of at least 1, got 0"),
        ({"heads": 3}, "heads=3 must divide the width 8"),
        ({"width": -2}, "width must be"),
        ({"architecture": "lstm"}, "architecture must be one of 'attention', 'mlp', got 'lstm'"),
        ({"query": "words"}, "query must be one of 'mean', 'tokens'"),
        ({"query_norm": "batch"}, "query_norm must be one of"),
        ({"fusion": "film"}, "fusion must be one of"),
        ({"initial_keep": 1.0}, "initial_keep must lie in"),
        ({"query_scale": 0.0}, "query_scale must be a positive"),
    ],
)
def test_bad_configurations_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        PolicyConfig(**({"token_width": 8, "query_width": 6} | fields))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": None}, "needs 'tokens'"),
        ({"tokens": torch.zeros(3, 7, 5)}, "'tokens' must have 3 dimensions, the last of 8"),
        ({"query": torch.zeros(3, 4, 6)}, "'query' must have 2 dimensions"),
    ],
)
def test_bad_observations_are_named(change, message):
    obs = observation(CONFIGS["paper"]) | change
    obs = {key: value for key, value in obs.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        build(CONFIGS["paper"])(obs)


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_policies_come_back(name, tmp_path):
    torch.manual_seed(1)
    policy, obs = PruningPolicy(CONFIGS[name]), observation(CONFIGS[name])
    policy.save_pretrained(tmp_path / "policy")
    again = PruningPolicy.from_pretrained(tmp_path / "policy")
    assert again.config == policy.config
    assert torch.equal(again(obs).logits, policy(obs).logits)
    assert sorted(p.name for p in (tmp_path / "policy").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize(("name", "steps"), [("paper", 1), ("steps", 3)])
def test_folders_from_before_trained_steps_still_open(name, steps, tmp_path):
    config = {
        "paper": PolicyConfig(token_width=8, query_width=5, budget=True),
        "steps": PolicyConfig(token_width=8, query_width=5, step_input=True, max_steps=3),
    }[name]
    policy = PruningPolicy(config)
    old = {k: v for k, v in dataclasses.asdict(config).items() if k != "trained_steps"}
    save_weights(tmp_path, kind="pruning-policy", config=old, module=policy)
    again = PruningPolicy.from_pretrained(tmp_path)
    assert again.config == dataclasses.replace(config, trained_steps=steps)
    assert torch.equal(again.critic.score.weight, policy.critic.score.weight)


def _saved(tmp_path):
    PruningPolicy(CONFIGS["paper"]).save_pretrained(tmp_path)
    return tmp_path / "config.json", tmp_path / "model.safetensors"


def test_other_weights_are_refused(tmp_path):
    _, weights = _saved(tmp_path)
    header = {"kind": "pruning-policy"}
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["kind"]
    header["config"] = json.dumps(fields, sort_keys=True)
    good = load_file(weights)

    def rewrite(tensors, metadata=header):
        save_file(tensors, weights, metadata=metadata)

    rewrite({k: v for k, v in good.items() if k != "query_in.bias"})
    with pytest.raises(ValueError, match=r"missing query_in\.bias, unexpected nothing"):
        PruningPolicy.from_pretrained(tmp_path)
    rewrite(good | {"more": torch.zeros(1)})
    with pytest.raises(ValueError, match="missing nothing, unexpected more"):
        PruningPolicy.from_pretrained(tmp_path)
    rewrite(good | {"query_in.bias": torch.zeros(9)})
    with pytest.raises(ValueError, match=r"query_in.bias must have shape \(8,\), got \(9,\)"):
        PruningPolicy.from_pretrained(tmp_path)
    rewrite(good, {"kind": "autoencoder"})
    with pytest.raises(ValueError, match="different saves"):
        PruningPolicy.from_pretrained(tmp_path)
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="damaged"):
        PruningPolicy.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        PruningPolicy.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        PruningPolicy.from_pretrained(tmp_path / "elsewhere")


def test_other_configurations_are_refused(tmp_path):
    config, _ = _saved(tmp_path)
    good = json.loads(config.read_text())
    for content, message in (
        (json.dumps(good | {"depth": 3}), "does not describe a policy"),
        (json.dumps(good | {"heads": 3}), "does not describe a policy"),
        (json.dumps(good | {"heads": 2}), "different saves"),
        (json.dumps(good | {"kind": "autoencoder"}), "must describe a pruning-policy"),
        (json.dumps([1]), "must describe a pruning-policy"),
        ("{", "not valid JSON"),
    ):
        config.write_text(content)
        with pytest.raises(ValueError, match=message):
            PruningPolicy.from_pretrained(tmp_path)


def test_positions_tell_equal_tokens_apart():
    torch.manual_seed(0)
    obs = observation(PolicyConfig(token_width=8, query_width=5))
    obs["tokens"] = obs["tokens"][:, :1].expand(-1, 7, -1)  # seven copies of one token
    obs["alive"] = torch.ones_like(obs["alive"])
    plain = PruningPolicy(PolicyConfig(token_width=8, query_width=5)).double()
    placed = PruningPolicy(PolicyConfig(token_width=8, query_width=5, position_slots=7)).double()
    assert plain.logits(obs).std(dim=1).max() < 1e-12
    assert placed.logits(obs).std(dim=1).min() > 1e-4


def test_more_tokens_than_positions_are_refused():
    config = PolicyConfig(token_width=8, query_width=5, position_slots=6)
    with pytest.raises(ValueError, match="knows 6 positions, got 7 tokens"):
        PruningPolicy(config).double().logits(observation(config))
    with pytest.raises(ValueError, match="position_slots must be an integer of at least 0"):
        PolicyConfig(token_width=8, query_width=5, position_slots=-1)


def test_log_odds_that_are_not_finite_are_refused_at_inference():
    config = PolicyConfig(8, 5)
    policy, obs = build(config), observation(config)
    with torch.no_grad():
        policy.actor.score.bias.fill_(math.nan)
        for call in (policy, policy.logits):
            with pytest.raises(ValueError, match=r"logits must be finite, got nan for \d of \d"):
                call(obs)
    assert policy(obs).logits.isnan().any()  # in training the loss decides
