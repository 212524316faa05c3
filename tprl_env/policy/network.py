"""The pruning policy and its value function (TPRL eq. 9-18), plus optional components.

The options are off by default; docs/experiments.md measures them.

Shapes: B batch, N visual tokens (padded), d code width, Q question tokens, d_q query width,
w policy width, H question heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tprl_env.checks import check_choice, check_integer, check_types
from tprl_env.policy.distributions import check_logits
from tprl_env.policy.layers import AreaEncoding, AttentionBlock, QuestionMatch, ResidualHead
from tprl_env.policy.weights import MOST_LAYERS, WIDEST, load_module, read_config, save_weights

DEAD_LOGIT = -1e9  # large, finite: softmax, sigmoid and their gradients stay numbers

Architecture = Literal["attention", "mlp"]
Query = Literal["mean", "tokens"]
Fusion = Literal["concat", "gated"]
Norm = Literal["none", "rms", "layer"]


class PolicyOutput(NamedTuple):
    """Result of one forward pass.

    Attributes:
        logits: float (B, N), log-odds of keeping each token; ``DEAD_LOGIT`` where dead.
        value: float (B,), the critic's estimate.
    """

    logits: Tensor
    value: Tensor


@dataclass(frozen=True)
class PolicyConfig:
    """Architecture of a :class:`PruningPolicy`; the defaults are the paper's.

    Attributes:
        token_width: Width d of the codes.
        query_width: Width d_q of the question's embeddings.
        width: Width w inside. None uses the codes as they are (the paper: w = d); a number adds
            a linear projection of the codes.
        layers: Attention blocks of eq. 10-11.
        heads: Attention heads; must divide the width.
        hidden: Width inside the residual MLPs; None means 4 w.
        architecture: "mlp" drops the attention (TPRL table 8): the projected query is added to
            every token instead, so that the policy still knows the question.
        query: "mean" takes one vector per question (the paper), "tokens" lets every visual token
            look at the embedding of every question token.
        question_heads: Bilinear heads of ``query="tokens"``.
        fusion: "gated" gives the policy head the product of token and mean query as well.
        budget: Condition on log(wanted count / alive tokens), in actor and critic.
        step_input: Condition on the step, one-hot of ``max_steps``.
        max_steps: Steps that ``step_input`` tells apart; stored with ``step_input`` only.
        token_norm: LayerNorm on the codes.
        query_norm: Of the query embeddings, whose size differs by orders of magnitude between
            LLMs; "rms" has no parameters.
        query_scale: Factor on the query after its normalisation.
        position_slots: Learned embeddings of the tokens' original indices; 0 for none, as in the
            paper: without, a policy cannot keep one of two tokens that are alike.
        coordinates: Tell each token by where it is in its picture (`AreaEncoding`), where pictures
            have no grid in common; ``position_slots`` must be 0 then.
        value_query: Let the critic see the mean query directly.
        value_input_detach: Stop the critic's gradient before the shared features.
        initial_keep: Keep-probability around which an untrained policy starts.
        trained_steps: Steps per episode (T) that it was trained to take, 1 for imitation and by
            hand; `PolicyPruner.as_trained` acts in as many.
    """

    token_width: int
    query_width: int
    width: int | None = None
    layers: int = 1
    heads: int = 4
    hidden: int | None = None
    architecture: Architecture = "attention"
    query: Query = "mean"
    question_heads: int = 8
    fusion: Fusion = "concat"
    budget: bool = False
    step_input: bool = False
    max_steps: int = 3
    token_norm: bool = False
    query_norm: Norm = "none"
    query_scale: float = 1.0
    position_slots: int = 0
    coordinates: bool = False
    value_query: bool = False
    value_input_detach: bool = False
    initial_keep: float = 0.5
    trained_steps: int = 1

    def __post_init__(self) -> None:
        """Refuse values that no policy can be built from."""
        check_types(self)
        for name in ("token_width", "query_width", "layers", "heads", "question_heads"):
            _check_positive(name, getattr(self, name))
        for name in ("max_steps", "trained_steps"):
            _check_positive(name, getattr(self, name))
        check_integer("position_slots", self.position_slots, 0)
        if self.coordinates and self.position_slots:
            raise ValueError(
                f"position_slots={self.position_slots} and coordinates both say where a token is; "
                f"leave position_slots at 0"
            )
        for name in ("width", "hidden"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        for name, value in vars(self).items():
            most = MOST_LAYERS if name == "layers" else WIDEST
            if isinstance(value, int) and value > most:
                raise ValueError(f"{name} must be at most {most}, got {value}")
        for name, kind in (
            ("architecture", Architecture),
            ("query", Query),
            ("fusion", Fusion),
            ("query_norm", Norm),
        ):
            check_choice(name, getattr(self, name), get_args(kind))
        if self.architecture == "attention" and self.inner_width % self.heads:
            raise ValueError(f"heads={self.heads} must divide the width {self.inner_width}")
        if not 0.0 < self.initial_keep < 1.0:
            raise ValueError(f"initial_keep must lie in (0, 1), got {self.initial_keep!r}")
        if not (math.isfinite(self.query_scale) and self.query_scale > 0):
            raise ValueError(f"query_scale must be a positive number, got {self.query_scale!r}")

    @property
    def inner_width(self) -> int:
        """Width w of the shared features."""
        return self.token_width if self.width is None else self.width

    @property
    def conditions(self) -> int:
        """Scalars that budget and step conditioning feed in."""
        return int(self.budget) + (self.max_steps if self.step_input else 0)

    @classmethod
    def question_aware(cls, token_width: int, query_width: int, **changes: Any) -> PolicyConfig:
        """The recommended policy: attends to the question's tokens and is told the budget.

        Args:
            token_width: Width of the codes.
            query_width: Width of the question's embeddings.
            **changes: Fields to set differently.
        """
        fields: dict[str, Any] = {
            "width": 64,
            "query": "tokens",
            "budget": True,
            "token_norm": True,
            "query_norm": "rms",
            "value_query": True,
        }
        return cls(token_width, query_width, **(fields | changes))


class PruningPolicy(nn.Module):
    """Actor and critic over the tokens of an image, told the question.

    X = [Z; q~] is mixed by attention among alive tokens; a residual MLP makes a log-odds of each,
    another a value of their mean. Without ``position_slots`` their order has no meaning.

    Args:
        config: The architecture.
    """

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        width = config.inner_width
        hidden = 4 * width if config.hidden is None else config.hidden
        d, d_q = config.token_width, config.query_width
        self.token_norm = nn.LayerNorm(d) if config.token_norm else nn.Identity()
        self.token_in = nn.Identity() if config.width is None else nn.Linear(d, width)
        self.query_norm = _query_norm(config)
        self.query_in = nn.Linear(d_q, width)
        if config.position_slots:
            self.position = nn.Embedding(config.position_slots, width)
            nn.init.normal_(self.position.weight, std=0.1)
        if config.coordinates:
            self.area = AreaEncoding(width)
        if config.conditions:
            self.condition = nn.Linear(config.conditions, width, bias=False)
        if config.query == "tokens":
            self.match = QuestionMatch(d, d_q, config.question_heads, width)
        if config.fusion == "gated":
            self.gate_token, self.gate_query = nn.Linear(d, width), nn.Linear(d_q, width)
        if config.architecture == "attention":
            self.blocks = nn.ModuleList(
                AttentionBlock(width, config.heads) for _ in range(config.layers)
            )
        else:
            self.mlp_norm = nn.LayerNorm(width)
        self.actor = ResidualHead(width, hidden, extra=width if config.fusion == "gated" else 0)
        if config.value_query:
            self.value_query = nn.Linear(d_q, width, bias=False)
        self.critic = ResidualHead(width, hidden)
        nn.init.constant_(
            self.actor.score.bias, math.log(config.initial_keep / (1 - config.initial_keep))
        )

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.query_in.weight.device

    def forward(self, obs: Mapping[str, Tensor]) -> PolicyOutput:
        """Log-odds per token and value per row.

        Args:
            obs: The environment's observation, batched: ``tokens`` (B, N, d), ``alive`` (B, N)
                0/1, ``query`` (B, d_q) or, for ``query="tokens"``, (B, Q, d_q) with
                ``query_mask`` (B, Q) 0/1; ``budget`` (B, 1), the wanted count, and ``step``
                (B, 1) where the configuration uses them; ``areas`` (B, N, 5) for
                ``coordinates``. Other keys are ignored.

        Raises:
            ValueError: On a missing key or a shape that does not fit, or, without gradients, on
                log-odds that are not finite.
        """
        alive, query, features, condition, extra = self._shared(obs)
        logits = self._masked(self.actor(features, extra), alive)
        return PolicyOutput(logits, self._value(features, alive, query, condition))

    def logits(self, obs: Mapping[str, Tensor]) -> Tensor:
        """The log-odds alone, (B, N): a forward pass without the critic."""
        return self.token_features(obs)[2]

    def token_features(self, obs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Token features (B, N, w), mean question (B, d_q), log-odds (B, N)."""
        alive, query, features, _, extra = self._shared(obs)
        return features, query, self._masked(self.actor(features, extra), alive)

    @staticmethod
    def _masked(logits: Tensor, alive: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # a training loop stops at its loss and says where
            check_logits(logits, alive)
        return logits.masked_fill(~alive, DEAD_LOGIT)

    def _shared(
        self, obs: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Alive mask, mean query, token features, conditioning vector and gated features."""
        alive = _entry(obs, "alive", 2).bool()
        dtype = self.query_in.weight.dtype
        tokens = _entry(obs, "tokens", 3, self.config.token_width).to(dtype)
        codes = self.token_norm(tokens)
        mean, question, mask = self._query(obs, dtype)
        condition = self._condition(obs, alive, dtype)
        x, q = self.token_in(codes), self.query_in(mean)
        if question is not None and mask is not None:
            x = x + self.match(codes, question, mask)
        if self.config.position_slots:
            x = x + self.position(self._indices(obs, x))
        if self.config.coordinates:
            x = x + self.area(_entry(obs, "areas", 3, 5).to(dtype))
        if condition is not None:
            x, q = x + condition[:, None], q + condition
        if self.config.architecture == "attention":
            x = torch.cat([x, q[:, None]], dim=1)
            visible = None
            if not bool(alive.all()):  # the masked kernel is slower
                visible = F.pad(alive, (0, 1), value=True)[:, None, None]
            for block in self.blocks:
                x = block(x, visible)
            x = x[:, :-1]
        else:
            x = self.mlp_norm(x + q[:, None])
        extra = None
        if self.config.fusion == "gated":
            extra = F.gelu(self.gate_token(codes) * self.gate_query(mean)[:, None])
        return alive, mean, x, condition, extra

    def _indices(self, obs: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Original indices (B, N) or (N,); ``index`` in the observation where tokens were moved."""
        if "index" in obs:
            return obs["index"]
        if x.shape[1] > self.config.position_slots:
            raise ValueError(
                f"the policy knows {self.config.position_slots} positions, got {x.shape[1]} "
                "tokens; train it on a source with at least as many"
            )
        return torch.arange(x.shape[1], device=x.device)

    def _query(
        self, obs: Mapping[str, Tensor], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Normalised mean query (B, d_q), and question tokens with their mask if wanted."""
        width, scale = self.config.query_width, self.config.query_scale
        if self.config.query == "mean":
            query = _entry(obs, "query", 2, width).to(dtype)
            return self.query_norm(query) * scale, None, None
        question = self.query_norm(_entry(obs, "query", 3, width).to(dtype)) * scale
        mask = _entry(obs, "query_mask", 2).bool()
        weight = mask.to(dtype)[..., None]
        mean = (question * weight).sum(1) / weight.sum(1).clamp(min=1)
        return mean, question, mask

    def _condition(
        self, obs: Mapping[str, Tensor], alive: Tensor, dtype: torch.dtype
    ) -> Tensor | None:
        """Embedding (B, w) of the budget and the step."""
        parts = []
        if self.config.budget:
            budget = _entry(obs, "budget").reshape(-1, 1).to(dtype)
            number = alive.sum(1, keepdim=True).clamp(min=1)
            parts.append(torch.log(budget.clamp(min=1) / number))
        if self.config.step_input:
            last = self.config.max_steps - 1
            step = _entry(obs, "step").reshape(-1).long().clamp(0, last)
            parts.append(F.one_hot(step, self.config.max_steps).to(dtype))
        return self.condition(torch.cat(parts, dim=1)) if parts else None

    def _value(
        self, features: Tensor, alive: Tensor, query: Tensor, condition: Tensor | None
    ) -> Tensor:
        weight = alive.to(features.dtype)[..., None]
        pooled = (features * weight).sum(1) / weight.sum(1).clamp(min=1)
        if self.config.value_input_detach:
            pooled = pooled.detach()
            condition = None if condition is None else condition.detach()
        if condition is not None:
            pooled = pooled + condition
        if self.config.value_query:
            pooled = pooled + self.value_query(query)
        return self.critic(pooled)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` into a folder, each atomically."""
        fields = asdict(self.config)
        if not self.config.coordinates:
            del fields["coordinates"]  # which earlier releases do not know
        if not self.config.step_input:
            del fields["max_steps"]  # means nothing then, and would read as the trained steps
        save_weights(folder, kind="pruning-policy", config=fields, module=self)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> Self:
        """Load what :meth:`save_pretrained` wrote; anything missing, extra or torn is refused.

        Folders from before ``trained_steps`` count as trained in ``max_steps`` steps with
        ``step_input``, in one step without: that is how they have been evaluated.

        Raises:
            FileNotFoundError: When the folder or one of its two files is missing.
            ValueError: When the content does not fit.
        """
        fields = read_config(folder, kind="pruning-policy")
        try:
            before = fields.get("max_steps", 1) if fields.get("step_input") else 1
            config = PolicyConfig(**{"trained_steps": before, **fields})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder}/config.json does not describe a policy: {error}") from error
        policy = load_module(
            folder, kind="pruning-policy", config=fields, build=lambda: cls(config)
        )
        return policy.to(device)


def _query_norm(config: PolicyConfig) -> nn.Module:
    if config.query_norm == "layer":
        return nn.LayerNorm(config.query_width, eps=1e-8)  # embeddings of 1e-2 are common
    if config.query_norm == "rms":
        return nn.RMSNorm(config.query_width, eps=1e-8, elementwise_affine=False)
    return nn.Identity()


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def _entry(
    obs: Mapping[str, Tensor], key: str, dims: int | None = None, width: int | None = None
) -> Tensor:
    """One entry of the observation, its rank and last dimension checked."""
    if key not in obs:
        raise ValueError(f"the policy needs {key!r} in the observation, got {', '.join(obs)}")
    value = obs[key]
    if (dims is not None and value.dim() != dims) or (
        width is not None and value.shape[-1] != width
    ):
        wanted = f"{dims} dimensions" + ("" if width is None else f", the last of {width}")
        raise ValueError(
            f"observation {key!r} must have {wanted}, got shape {tuple(value.shape)}; "
            "check token_width, query_width and query of the PolicyConfig"
        )
    return value
