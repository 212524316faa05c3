"""Stages 1 and 2: the vision tower's layers up to the selected one, then its CLS head."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from tprl_env.data.scenes import BACKGROUND, COLORS, GRID, NO_COLOR, TASKS, SceneWorld
from tprl_env.lvlm.tiny.model import (
    HEAD_WIDTH,
    HEADS,
    WIDTH,
    by_cell,
    to_pixels,
    tower_features,
    vision_parts,
)
from tprl_env.lvlm.tiny.recipe import Recipe

Log = Callable[[str], None]
CLASSES = BACKGROUND + 1
CELLS = GRID * GRID


def cosine(step: int, steps: int, warmup: int) -> float:
    """Learning-rate factor: linear warm-up, then a cosine down to 2 %."""
    decay = 0.5 * (1 + math.cos(math.pi * step / steps)) * 0.98 + 0.02
    return min(1.0, (step + 1) / warmup) * decay


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the learning rate ``rate``."""
    for group in optimizer.param_groups:
        group["lr"] = rate


class _Probes(nn.Module):
    """Read-outs that exist only during training; inputs are ``(..., WIDTH)`` features."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, CLASSES + NO_COLOR + 1)
        self.deep = nn.Sequential(nn.Linear(WIDTH, 256), nn.GELU(), nn.Linear(256, CLASSES))
        self.local = nn.Linear(WIDTH, 2 * GRID + NO_COLOR + 1)

    def content(self, features: Tensor, classes: Tensor, colors: Tensor) -> Tensor:
        """Class and colour loss; targets have the shape of the features without the last axis."""
        scores = self.linear(features).flatten(0, -2)
        deep = self.deep(features).flatten(0, -2)
        classes, colors = classes.reshape(-1), colors.reshape(-1)
        loss = F.cross_entropy(scores[:, :CLASSES], classes) + F.cross_entropy(deep, classes)
        return loss + 0.3 * F.cross_entropy(scores[:, CLASSES:], colors)

    def place(self, patches: Tensor, colors: Tensor) -> Tensor:
        """Every patch ``(B, 36, 4, WIDTH)`` keeps its colour, its row and its column."""
        scores = self.local(patches).flatten(0, 2)
        cells = torch.arange(CELLS).view(1, CELLS, 1).expand(patches.shape[:3]).reshape(-1)
        own = colors[:, :, None].expand(patches.shape[:3]).reshape(-1)
        rows = F.cross_entropy(scores[:, :GRID], cells // GRID)
        columns = F.cross_entropy(scores[:, GRID : 2 * GRID], cells % GRID)
        return 0.3 * F.cross_entropy(scores[:, 2 * GRID :], own) + 0.2 * (rows + columns)


def redundancy(patches: Tensor, classes: Tensor) -> Tensor:
    """How much patches differ inside a cell, and background patches from each other.

    Args:
        patches: ``(B, 36, 4, WIDTH)``.
        classes: ``(B, 36)``.
    """
    unit = F.normalize(patches, dim=-1)
    within = (unit - unit.mean(2, keepdim=True)).square().sum(-1).mean()
    back = unit[classes == BACKGROUND].flatten(0, 1)
    return within + (back - back.mean(0)).square().sum(-1).mean()


def _targets(world: SceneWorld, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels ``(n, 3, 96, 96)``, classes and colours ``(n, 36)``."""
    images, classes, colors = world.batch(n)
    labels = torch.from_numpy(classes).flatten(1), torch.from_numpy(colors).flatten(1)
    return to_pixels(images), *labels


def _tower_parameters(
    model: LlavaForConditionalGeneration, recipe: Recipe
) -> Iterator[nn.Parameter]:
    tower = vision_parts(model)
    yield from tower.embeddings.parameters()
    yield from tower.pre_layrnorm.parameters()
    for i, layer in enumerate(tower.encoder.layers[:-1]):
        for name, parameter in layer.named_parameters():
            if i in recipe.attend or name.startswith(("mlp", "layer_norm2")):
                yield parameter


def train_tower(model: LlavaForConditionalGeneration, recipe: Recipe, seed: int, log: Log) -> float:
    """Stage 1. Returns the digit accuracy over the last 5 % of the steps (training scenes).

    Without attention, class and colour are asked of the MEAN of a cell's patches, so that one
    patch says little; with attention, of EVERY patch, so that one patch says everything.
    """
    world = SceneWorld(recipe.task, "train", seed=100 + seed, warps=2 * recipe.warps, distort=1.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        probes = _Probes()
    parameters = [*_tower_parameters(model, recipe), *probes.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.05)
    steps, right, asked = recipe.tower_steps, 0.0, 0.0
    for step in range(steps):
        set_rate(optimizer, 2e-3 * cosine(step, steps, warmup=100))
        world.digits, world.decoys = recipe.tower_digits, recipe.tower_decoys
        if step > 0.8 * steps:
            world.digits, world.decoys = TASKS[recipe.task]
        pixels, classes, colors = _targets(world, 24)
        patches = by_cell(tower_features(model, pixels, recipe.attend)[:, 1:])
        loss = probes.place(patches, colors)
        if recipe.attend:
            each = classes[..., None].expand(-1, -1, 4), colors[..., None].expand(-1, -1, 4)
            loss = loss + probes.content(patches, *each) + 0.5 * redundancy(patches, classes)
        else:
            loss = loss + probes.content(patches.mean(2), classes, colors)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step >= int(0.95 * steps) or step % 100 == 0:
            with torch.no_grad():
                hit = probes.deep(patches.mean(2)).argmax(-1) == classes
            digit = classes < 10
            if step % 100 == 0:
                log(f"tower {step}/{steps} loss {loss:.3f} digits {hit[digit].float().mean():.3f}")
            if step >= int(0.95 * steps):
                right, asked = right + float(hit[digit].sum()), asked + float(digit.sum())
    return right / asked


def _cls_row(model: LlavaForConditionalGeneration, hidden: Tensor) -> Tensor:
    """The tower's pooled output ``(B, WIDTH)``, computing the last layer for CLS only."""
    tower = vision_parts(model)
    layer, n = tower.encoder.layers[-1], len(hidden)
    attention, normed = layer.self_attn, layer.layer_norm1(hidden)

    def heads(x: Tensor) -> Tensor:
        return x.view(n, -1, HEADS, HEAD_WIDTH).transpose(1, 2)

    read = F.scaled_dot_product_attention(
        heads(attention.q_proj(normed[:, :1])),
        heads(attention.k_proj(normed)),
        heads(attention.v_proj(normed)),
    )
    out = hidden[:, :1] + attention.out_proj(read.transpose(1, 2).reshape(n, 1, WIDTH))
    out = out + layer.mlp(layer.layer_norm2(out))
    return tower.post_layernorm(out[:, 0])


def _divergence(scores: Tensor, counts: Tensor) -> Tensor:
    """KL from predicted to true distribution of the digits' colours or classes."""
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    entropy = -(share * share.clamp(min=1e-9).log()).sum(-1)
    return (-(share * F.log_softmax(scores, -1)).sum(-1) - entropy).mean()


def train_cls_head(
    model: LlavaForConditionalGeneration, recipe: Recipe, seed: int, log: Log
) -> None:
    """Stage 2: CLS predicts the digits' colours and classes, so it attends to digits.

    Their number is not asked: it is more easily read off the background.
    """
    (least, most), (_, decoys) = TASKS[recipe.task]
    world = SceneWorld(
        recipe.task,
        "train",
        seed=200 + seed,
        digits=(least // 2, min(most + 6, 30)),
        decoys=(0, max(5, decoys)),
        warps=max(1, recipe.warps // 2),
    )
    tower = vision_parts(model)
    layer = tower.encoder.layers[-1]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed + 2)
        layer.self_attn.out_proj.weight.normal_(0, 0.06)
        layer.self_attn.out_proj.bias.zero_()
        head = nn.Linear(WIDTH, len(COLORS) + 10)
    parameters = [*layer.parameters(), *tower.post_layernorm.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-3, weight_decay=0.02)
    for step in range(recipe.head_steps):
        set_rate(optimizer, 1.5e-3 * cosine(step, recipe.head_steps, warmup=50))
        pixels, classes, colors = _targets(world, 32)
        with torch.no_grad():
            hidden = tower_features(model, pixels, recipe.attend)
        digit = classes < 10
        by_color, by_class = (
            torch.stack([((labels == k) & digit).sum(1) for k in range(n)], 1).float()
            for labels, n in ((colors, len(COLORS)), (classes, 10))
        )
        out = head(_cls_row(model, hidden))
        loss = _divergence(out[:, : len(COLORS)], by_color)
        loss = loss + _divergence(out[:, len(COLORS) :], by_class)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 200 == 0:
            log(f"cls {step}/{recipe.head_steps} loss {loss:.3f}")
