"""Collecting a sample at a time, as research code does it: a contender of `rollout`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from benchmarks.contenders import Cost, Watch, new_module, open_lvlm
from tprl_env.data import graders
from tprl_env.data.features import shared_source
from tprl_env.env import rewards
from tprl_env.env.episodes import choose_episode
from tprl_env.env.scorer import BoolArray
from tprl_env.lvlm import find_lvlm
from tprl_env.lvlm.protocol import Prompt
from tprl_env.rllib.config import TrainConfig

NEW_TOKENS = 20

Answer = Callable[[Prompt, npt.NDArray[np.float16], BoolArray], str]
"""Text for one prompt, the (n, D) visual tokens of its image, and a mask (n,)."""


def by_transformers(spec: str) -> Answer:
    """The library's own ``generate``, on the CPU in float32.

    Written out without ``tprl_env.lvlm``'s assembling of prompts: a reference of its own, whose
    answers `rollout` compares with the scorer's.
    """
    folder, _ = find_lvlm(spec)
    model: Any = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True
    ).eval()
    processor = LlavaProcessor.from_pretrained(folder)
    embedding = model.get_input_embeddings()

    @torch.inference_mode()
    def answer(prompt: Prompt, visual: npt.NDArray[np.float16], keep: BoolArray) -> str:
        at, after = prompt.visual_at[0], prompt.visual_at[0] + len(visual)
        kept = torch.from_numpy(np.flatnonzero(keep))
        text = embedding(torch.tensor(prompt.ids))
        tokens = torch.from_numpy(np.array(visual)).float()[kept]
        embeds = torch.cat([text[:at], tokens, text[at + 1 :]])[None]
        behind = torch.arange(after, after + len(prompt.ids) - at - 1)
        written = model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.int64),
            position_ids=torch.cat([torch.arange(at), at + kept, behind])[None],
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
        return str(processor.decode(written[0], skip_special_tokens=True)).strip()

    return answer


def by_our_decoder(spec: str) -> Answer:
    """``LlavaLVLM.generate``: the same answers without the library's bookkeeping."""
    lvlm = open_lvlm(spec)

    def answer(prompt: Prompt, visual: npt.NDArray[np.float16], keep: BoolArray) -> str:
        return lvlm.generate([prompt], [visual], [keep], max_new_tokens=NEW_TOKENS)[0]

    return answer


class OneByOne:
    """One row through the policy and one answer generated and graded per step; no cache."""

    def __init__(self, config: TrainConfig, episodes: int, answer: Answer) -> None:
        self._episodes, self._rules, self._answer = episodes, config.rules, answer
        self._source = shared_source(config.source)
        self._full = self._source.full_scores("exact")
        self._lvlm = open_lvlm(config.lvlm)
        self._module = new_module(config)
        self._module.generator.manual_seed(config.seed)
        self._random = np.random.default_rng(config.seed)
        self.asked: list[tuple[int, BoolArray, float]] = []

    def iterate(self) -> Cost:
        """Collect a few episodes."""
        cost, watch = Cost(), Watch()
        for _ in range(self._episodes):
            sample = choose_episode(self._random, self._source, self._rules)[0]
            cost.steps += self._episode(sample, cost)
        cost.collect, cost.wall = watch.read()
        cost.collect_wall = cost.wall
        return cost

    def _episode(self, sample: int, cost: Cost) -> int:
        """Steps of one episode."""
        number, rule = np.array([sample]), self._rules
        tokens = torch.from_numpy(self._source.codes(number))
        query = torch.from_numpy(self._source.query(number))
        alive, score = self._source.exists(number), float(self._full[sample])
        prompt = self._lvlm.prompt(self._source.question(sample))
        visual = self._source.tokens(sample)
        for step in range(rule.max_steps):
            stage, mask = torch.full((1, 1), float(step)), torch.from_numpy(alive)
            obs = {"tokens": tokens, "query": query, "alive": mask, "step": stage}
            before = int(alive.sum())
            alive = alive & self._module.act(obs).actions.numpy().astype(bool)
            kept, previous, watch = int(alive.sum()), score, Watch()
            text = self._answer(prompt, visual, alive[0, : len(visual)])
            score = graders.exact(text, self._source.answers(sample))
            cost.scoring += watch.read()[0]
            rewards.step_reward(score, previous, kept, before, rule.alpha, rule.beta)
            self.asked.append((sample, alive[0], score))
            if rewards.is_terminal(kept, step + 1, rule.max_steps, rule.min_tokens):
                return step + 1
        return rule.max_steps

    def close(self) -> None:
        """Nothing to stop."""
