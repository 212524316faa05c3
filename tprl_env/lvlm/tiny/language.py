"""Stages 3 and 4: the projector alone, then projector and LLM, then pruned prefixes.

Ten questions about a scene share one image prefix: every question sees the prefix and itself, and
its positions start right after the 144 visual tokens. Pruned prefixes keep original positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from tprl_env.data.scenes import (
    BACKGROUND,
    COLOR_NAMES,
    COLUMNS,
    GRID,
    NO_COLOR,
    QUESTION_TYPES,
    ROWS,
    TOKENS,
    Question,
    SceneWorld,
    ask,
)
from tprl_env.lvlm.tiny.model import (
    BOS,
    DIGITS,
    EOS,
    PAD,
    WIDTH,
    by_cell,
    image_rotation,
    to_pixels,
    tower_features,
    word_ids,
)
from tprl_env.lvlm.tiny.recipe import Recipe
from tprl_env.lvlm.tiny.tower import CELLS, Log, cosine, set_rate

LONGEST = 11  # words of the longest question with "ASSISTANT:" and its answer
FIRST = 2 + TOKENS  # position of a question's first word: after "<s> USER: <image>"
IGNORE = -100
SCENES, QUESTIONS = 16, 10
EARLY = (
    0.40,
    0.20,
    0.12,
    0.10,
    0.16,
    0.02,
)  # shares of QUESTION_TYPES in the first 12 %: addresses first
LATE = (0.15, 0.08, 0.20, 0.17, 0.15, 0.25)
FRAGMENT_KINDS = (0.0, 0.2, 0.0, 0.8, 0.0, 0.0)  # for prefixes of loose tokens
FRAGMENT_SHARE = 0.4  # of the pruned prefixes of an unsmeared tower
TOKENS_OF_CELL = by_cell(torch.arange(TOKENS).view(1, TOKENS, 1))[0, :, :, 0]  # (36, 4)


@dataclass(frozen=True)
class Quiz:
    """Questions about a batch of scenes as tensors.

    Attributes:
        ids: ``(B, Q, LONGEST)`` words of question and answer, padded on the right.
        labels: ``(B, Q, LONGEST)`` next words from "ASSISTANT:" on, elsewhere `IGNORE`.
        question_types: ``(B, Q)`` index into `QUESTION_TYPES`.
    """

    ids: Tensor
    labels: Tensor
    question_types: npt.NDArray[np.int64]


def encode_quiz(questions: Sequence[Sequence[Question]], vocabulary: dict[str, int]) -> Quiz:
    """Turn ``B`` lists of ``Q`` questions into tensors."""
    shape = (len(questions), len(questions[0]), LONGEST)
    ids, labels = np.full(shape, PAD), np.full(shape, IGNORE)
    question_types = np.zeros(shape[:2], np.int64)
    for i, about_scene in enumerate(questions):
        for j, question in enumerate(about_scene):
            prompt = [vocabulary[word] for word in (*question.text.split(), "ASSISTANT:")]
            answer = [vocabulary[word] for word in question.answer.split()]
            end = len(prompt) + len(answer)
            ids[i, j, :end] = prompt + answer
            labels[i, j, len(prompt) - 1 : end] = [*answer, EOS]
            question_types[i, j] = QUESTION_TYPES.index(question.question_type)
    return Quiz(torch.from_numpy(ids), torch.from_numpy(labels), question_types)


def block_mask(prefix: int, questions: int) -> Tensor:
    """Causal mask ``(1, 1, T, T)`` in which questions see the prefix but not each other."""
    of_question = torch.arange(questions).repeat_interleave(LONGEST)
    block = torch.cat([torch.full((prefix,), -1), of_question])
    place = torch.arange(len(block))
    same = (block[None] == -1) | (block[None] == block[:, None])
    return ((place[:, None] >= place[None]) & same)[None, None]


def read_quiz(
    model: LlavaForConditionalGeneration, tokens: Tensor, keep: Tensor, ids: Tensor, user: int
) -> Tensor:
    """Hidden states of every question word, ``(B, Q, LONGEST, WIDTH)``.

    Args:
        model: The model.
        tokens: All visual tokens, ``(B, 144, WIDTH)``.
        keep: Indices of the tokens that stay, ascending, ``(B, K)``; positions are kept.
        ids: ``(B, Q, LONGEST)``.
        user: Token id of "USER:".
    """
    n, questions, _ = ids.shape
    text = model.model.language_model
    kept = torch.gather(tokens, 1, keep[..., None].expand(-1, -1, tokens.shape[-1]))
    start = text.embed_tokens(torch.tensor([[BOS, user]])).expand(n, -1, -1)
    after = FIRST + torch.arange(LONGEST).repeat(questions)
    positions = torch.cat([torch.arange(2).expand(n, -1), 2 + keep, after.expand(n, -1)], 1)
    out = text(
        inputs_embeds=torch.cat([start, kept, text.embed_tokens(ids.flatten(1))], 1),
        attention_mask=block_mask(2 + keep.shape[1], questions).expand(n, -1, -1, -1),
        position_ids=positions,
        use_cache=False,
    )
    words = out.last_hidden_state[:, -questions * LONGEST :]
    return words.reshape(n, questions, LONGEST, -1)


def grade(
    model: LlavaForConditionalGeneration, hidden: Tensor, labels: Tensor
) -> tuple[Tensor, npt.NDArray[np.bool_]]:
    """Loss over the answer words (end of answer at a tenth) and which answers are right."""
    spoken = labels != IGNORE
    scores, wanted = model.lm_head(hidden[spoken]), labels[spoken]
    weights = torch.where(wanted == EOS, 0.1, 1.0)
    loss = (F.cross_entropy(scores, wanted, reduction="none") * weights).sum() / weights.sum()
    right = torch.ones_like(labels, dtype=torch.bool)
    right[spoken] = (scores.argmax(-1) == wanted) | (wanted == EOS)
    return loss, right.all(-1).numpy()


def image_targets(
    model: LlavaForConditionalGeneration,
    recipe: Recipe,
    ids: dict[str, Tensor],
    classes: Tensor,
    colors: Tensor,
) -> Tensor:
    """What the projector should say of every cell in image space, ``(B, 36, WIDTH)``.

    Row + column + colour + digit; with redundant tokens (`Recipe.attend`) a background cell is one
    constant direction, so that backgrounds are redundant too.
    """
    words = model.model.language_model.embed_tokens.weight.detach() @ image_rotation().T
    nothing = torch.zeros(2, WIDTH)
    cell = torch.arange(CELLS)
    place = words[ids["rows"]][cell // GRID] + words[ids["columns"]][cell % GRID]
    digit = torch.cat([words[ids["digits"]], nothing])[classes]
    full = place + digit + torch.cat([words[ids["colors"]], nothing[:1]])[colors]
    if recipe.attend:
        full = torch.where((classes == BACKGROUND)[..., None], words[ids["dot"]][0], full)
    return full


def align_projector(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    seed: int,
    log: Log,
) -> None:
    """Stage 3a: regress projected tokens on the word directions, then tie ``lm_head`` to them."""
    world = SceneWorld(recipe.task, "train", seed=300 + seed, warps=max(1, recipe.warps * 2 // 3))
    groups = dict(rows=ROWS, columns=COLUMNS, colors=COLOR_NAMES, digits=DIGITS, dot=".")
    ids = {name: word_ids(tokenizer, tuple(words)) for name, words in groups.items()}
    projector, embeddings = (
        model.model.multi_modal_projector,
        model.model.language_model.embed_tokens,
    )
    optimizer = torch.optim.AdamW(projector.parameters(), lr=3e-3, weight_decay=0)
    digit_words = embeddings.weight.detach()[ids["digits"]] @ image_rotation().T
    for step in range(recipe.align_steps):
        set_rate(optimizer, 3e-3 * (1 - step / recipe.align_steps) + 1e-5)
        images, classes_, colors_ = world.batch(24)
        classes = torch.from_numpy(classes_).flatten(1)
        colors = torch.from_numpy(colors_).flatten(1)
        with torch.no_grad():
            seen = tower_features(model, to_pixels(images), recipe.attend)[:, 1:]
        said = by_cell(projector(seen))
        target = image_targets(model, recipe, ids, classes, colors)
        each = F.mse_loss(said, target[:, :, None].expand_as(said))
        scores, digit = said.mean(2) @ digit_words.T, classes < 10
        loss = F.mse_loss(said.mean(2), target) + (1.0 if recipe.attend else 0.2) * each
        loss = loss + 0.1 * F.cross_entropy(0.15 * scores[digit], classes[digit])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == recipe.align_steps - 1:
            hit = (scores.argmax(-1) == classes)[digit].float().mean()
            log(f"align {step}/{recipe.align_steps} loss {loss:.3f} digits {hit:.3f}")
    with torch.no_grad():
        model.lm_head.weight.copy_(embeddings.weight @ image_rotation().T * 0.2)


def draw_prefix(
    recipe: Recipe, classes: npt.NDArray[np.int64], rng: np.random.Generator, short: bool
) -> tuple[Tensor, npt.NDArray[np.bool_]]:
    """Draw a pruned prefix for every scene.

    ``short`` is the curriculum of the language stage: 12 whole cells, or (redundant tokens) one
    token of every cell. Otherwise 3 to 12 cells, digits first, whole and with four stray background
    or decoy tokens, or (redundant tokens) one to four tokens of each.

    Returns:
        Token indices, ascending, ``(B, K)``, and the kept cells ``(B, 36)``.
    """
    n, is_digit = len(classes), classes.reshape(len(classes), CELLS) < 10
    redundant, strays = bool(recipe.attend), 0
    if short:
        cells, each = (CELLS, 1) if redundant else (12, 4)
    else:
        cells, each = int(rng.choice([3, 4, 7, 12])), 4
        if redundant:
            each = int(rng.choice([1, 2, 4]))
            cells = int(rng.choice([4, 7, 14, 36]))
        else:
            strays = 4
    order = rng.random((n, CELLS)) + (0.5 if short else 1.0) * is_digit
    kept = np.argsort(-order, 1)[:, :cells]
    mask = np.zeros((n, CELLS), bool)
    np.put_along_axis(mask, kept, True, 1)
    ranks = rng.random((n, CELLS, 4)).argsort(-1)
    take = (ranks < each) & mask[..., None]  # (B, 36, 4)
    if strays:
        lots = rng.random((n, CELLS * 4)) + (mask | is_digit).repeat(4, 1)
        chosen = np.argsort(lots, 1)[:, :strays]
        flat = take.reshape(n, -1)
        np.put_along_axis(flat, chosen, True, 1)
        take = flat.reshape(n, CELLS, 4)
    index = np.broadcast_to(TOKENS_OF_CELL.numpy(), take.shape)[take].reshape(n, -1)
    return torch.from_numpy(np.sort(index, 1)), mask


def draw_fragments(
    classes: npt.NDArray[np.int64], rng: np.random.Generator
) -> tuple[Tensor, npt.NDArray[np.bool_]]:
    """Draw 9 to 20 loose tokens of six digit cells, mostly of one line; shapes as `draw_prefix`.

    A single token of an unsmeared tower shows a digit's colour, not its class: questions about
    such prefixes must be among `FRAGMENT_KINDS`. A budget that cuts through a line looks like this.
    """
    n, is_digit = len(classes), classes.reshape(len(classes), CELLS) < 10
    line, cell = rng.integers(2 * GRID, size=(n, 1)), np.arange(CELLS)[None]
    on_line = np.where(line < GRID, cell // GRID == line, cell % GRID == line - GRID)
    kept = np.argsort(-(rng.random((n, CELLS)) + (1.0 + on_line) * is_digit), 1)[:, :6]
    mask = np.zeros((n, CELLS), bool)
    np.put_along_axis(mask, kept, True, 1)
    lots = rng.random((n, 4 * CELLS)) + mask.repeat(4, 1)
    chosen = np.argsort(-lots, 1)[:, : int(rng.integers(9, 21))]
    mask = np.zeros((n, CELLS), bool)
    np.put_along_axis(mask, chosen // 4, True, 1)
    index = TOKENS_OF_CELL.numpy().reshape(-1)[chosen]
    return torch.from_numpy(np.sort(index, 1)), mask


@dataclass(frozen=True)
class Phase:
    """One run of the optimizer over projector and LLM.

    Attributes:
        name: For the log.
        steps: Optimizer steps.
        rate: Peak learning rate.
        short_share: First share of the steps, on short prefixes.
        pruned_share: Chance of a pruned prefix afterwards.
    """

    name: str
    steps: int
    rate: float
    short_share: float
    pruned_share: float


def train_language(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    phase: Phase,
    seed: int,
    log: Log,
) -> None:
    """Stages 3b and 4: train projector and LLM on questions; the tower stays frozen."""
    world = SceneWorld(recipe.task, "train", seed=seed, warps=recipe.warps)
    vocabulary, text = tokenizer.get_vocab(), model.model.language_model
    parameters = [
        *model.model.multi_modal_projector.parameters(),
        *text.parameters(),
        *model.lm_head.parameters(),
    ]
    optimizer = torch.optim.AdamW(parameters, lr=phase.rate, betas=(0.9, 0.98), weight_decay=0.02)
    everything, history = torch.arange(TOKENS).expand(SCENES, -1), []
    for step in range(phase.steps):
        set_rate(optimizer, phase.rate * cosine(step, phase.steps, warmup=100))
        images, classes, colors = world.batch(SCENES)
        short = step < phase.short_share * phase.steps
        early = phase.short_share > 0 and step < 0.12 * phase.steps
        keep, shares = everything, EARLY if early else LATE
        if short or world.rng.random() < phase.pruned_share:
            loose = not (short or recipe.attend) and world.rng.random() < FRAGMENT_SHARE
            if loose:
                keep, mask = draw_fragments(classes, world.rng)
                shares = FRAGMENT_KINDS
            else:
                keep, mask = draw_prefix(recipe, classes, world.rng, short)
            mask = mask.reshape(classes.shape)
            classes = np.where(mask, classes, BACKGROUND)
            colors = np.where(mask, colors, NO_COLOR)
        questions = []
        for scene in range(SCENES):
            drawn = world.rng.choice(len(QUESTION_TYPES), QUESTIONS, p=shares)
            question_types = [QUESTION_TYPES[k] for k in drawn]
            questions.append(
                ask(classes[scene], colors[scene], QUESTIONS, world.rng, question_types)
            )
        quiz = encode_quiz(questions, vocabulary)
        with torch.no_grad():
            seen = tower_features(model, to_pixels(images), recipe.attend)[:, 1:]
        tokens = model.model.multi_modal_projector(seen)
        hidden = read_quiz(model, tokens, keep, quiz.ids, vocabulary["USER:"])
        loss, right = grade(model, hidden, quiz.labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        history.append(
            [
                right[quiz.question_types == k].mean()
                if (quiz.question_types == k).any()
                else np.nan
                for k in range(len(QUESTION_TYPES))
            ]
        )
        if (step + 1) % 100 == 0:
            means = " ".join(f"{m:.3f}" for m in np.nanmean(history[-50:], 0))
            log(f"{phase.name} {step + 1}/{phase.steps} loss {loss:.3f} right {means}")
