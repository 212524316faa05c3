"""The Gymnasium environment of token pruning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt

from tprl_env.data.features.source import TokenSource
from tprl_env.env.episodes import Episodes, ScorerLike, choose_episode, open_environment
from tprl_env.env.reference_returns import reference_returns
from tprl_env.env.rules import (
    EpisodeRules,
    Query,
    ScoreKind,
    ScoreSteps,
    check_choice,
    check_options,
    coerce_action,
)

__all__ = ["RENDER_MODES", "TokenPruningEnv"]

RENDER_MODES = ("rgb_array", "ansi")
_FIRST = np.zeros(1, np.int64)


class TokenPruningEnv(gymnasium.Env[dict[str, npt.NDArray[Any]], npt.NDArray[np.int8]]):
    """Choose which visual tokens of an image a vision-language model (LVLM) may see.

    ## Description
    One episode is one question about one image. The image has been encoded into N visual tokens;
    in each step the agent keeps or prunes every token that is still alive, and a pruned token
    never returns. The LVLM answers from the tokens that remain; the reward is the change of its
    score plus a bonus for every share of tokens saved. This is the Markov decision process of
    TPRL. The environment only knows encoded samples (a *token source*) and a *scorer*, any
    callable from sample numbers and masks to scores; whether it is an LVLM, a pool of remote actors
    or a rule makes no difference. Without arguments a small generated source with
    a rule that can be learned is used, in which the relevant tokens are those of the colour that
    the question asks for.

    The id `tprl_env/TokenPruning-v0` is this class with its defaults, `tprl_env/TokenPruningToy-v0`
    with `source="toy:samples=64,tokens=8"`, `max_steps=1` and `beta=1.0`: small enough to see
    within seconds whether an algorithm learns. Gymnasium knows both once `tprl_env` is imported;
    the form `gym.make("tprl_env:tprl_env/TokenPruning-v0")` imports it.

    ## Action Space
    `MultiBinary(N)`: 1 keeps, 0 prunes the token at that place. Arrays of bool, int or float
    with the values 0 and 1 are accepted, anything else is refused with a `ValueError`. Entries
    of dead tokens (pruned earlier, or padding) have no effect.

    ## Observation Space
    A `Dict`; N is the largest number of tokens in the source, smaller images are padded.

    | key | shape, type | meaning |
    | --- | --- | --- |
    | `tokens` | (N, d) float32 | codes of the visual tokens, zero where padding |
    | `query` | (d_q,) float32 | mean embedding of the question's tokens |
    | `alive` | (N,) int8 | m_t: 1 for tokens still in play, 0 for pruned ones and padding |
    | `step` | (1,) float32 | steps taken so far, 0 to `max_steps` |
    | `budget` | (1,) float32 | number of tokens wanted at the end; only with `budget` |

    With `query="tokens"` the key `query` is (Q, d_q) float32, one row per token of the question,
    and `query_mask` (Q,) int8 says which rows exist. Values are bounded by the largest float16.

    ## Rewards
    r_t = alpha * [Score(m_{t+1}) - Score(m_t)] + beta * (1 - K_{t+1} / K_t), with K the number of
    kept tokens and Score(m_0) the score with all tokens. With `score_steps="final"` only the last
    mask is scored: the task term is zero before the last step and Score(m_T) - Score(m_0) there,
    which leaves the undiscounted return unchanged. Keeping no token at all is legal; the LVLM
    then answers from the text alone. A scorer that fails raises; a failure is never a reward.

    ## Starting State
    A sample drawn uniformly from the source, all of its tokens alive. With a budget range
    (low, high) the wanted count is drawn log-uniformly from its integers and cut to the tokens of
    the sample. `reset(options={"sample": 3, "budget": 12})` chooses them instead.

    ## Episode End
    Terminated after `max_steps` steps, or once at most `min_tokens` tokens are kept. Never
    truncated: the step is part of the observation, so its limit belongs to the task. The budget
    is a wish that the environment does not enforce.

    ## Information
    `reset` and `step` return: `sample` (row in the source), `id`, `kept` (K), `keep_ratio`,
    `full_score` (Score(m_0)), `mask` (bool (N,), True = kept), `score` (Score of the present mask;
    absent after a step that was not scored) and, with a budget, `budget`.

    `action_masks()` gives the mask that sb3-contrib's `MaskablePPO` asks for.

    ## Arguments
    - `source`: what `tprl_env.open_source` opens (a feature-store path, or "toy" with fields as in
      "toy:samples=64,tokens=16,seed=0"), or a token source.
    - `scorer`: callable (samples int64 (B,), keep bool (B, N)) -> scores (B,) in [0, 1]; None only
      for the toy source. Its attribute `score_kind`, if any, must equal `score_kind`.
    - `max_steps` (3): T_max.
    - `alpha` (1.0), `beta` (0.1): weights of the task and of the pruning term.
    - `score_steps` ("all"): "all" or "final", see Rewards.
    - `reward_batch_size` (1): only the vector environment can average rewards over a batch.
    - `min_tokens` (1): see Episode End.
    - `budget` (None): a wanted count, or a range (low, high), shown to the agent; floats up to 1
      are shares of the sample's tokens.
    - `score_kind` ("exact"): "exact", "likelihood" or "graded", what `full_scores` of the source
      means.
    - `query` ("mean"): "mean" or "tokens", see Observation Space.
    - `render_mode` (None): "rgb_array" or "ansi".

    ```python
    >>> import gymnasium as gym
    >>> import tprl_env
    >>> env = gym.make("tprl_env/TokenPruning-v0", source="toy:samples=8,tokens=16", max_steps=2)
    >>> observation, info = env.reset(seed=0)
    >>> sorted(observation), int(info["kept"])
    (['alive', 'query', 'step', 'tokens'], 16)
    >>> env.step(env.unwrapped.observation_space["alive"].low)[2:4]  # prune everything
    (True, False)

    ```

    ## Reference Returns
    `env.unwrapped.reference_returns()` plays three rules in an environment of any source and scorer
    and gives their mean undiscounted returns: `keep_all` never prunes, `random` keeps each token
    with probability 1/2 in each step, `best_rule` keeps the relevant tokens and no others from the
    first step on (absent where the source does not know them).

    | id | `keep_all` | `random` | `best_rule` |
    | --- | --- | --- | --- |
    | `tprl_env/TokenPruning-v0` | 0 | -0.73 | 0.084 |
    | `tprl_env/TokenPruningToy-v0` | 0 | 0.00 | 0.8125 |

    No policy earns more than `best_rule` in `TokenPruningToy-v0`. With several steps, as in
    `TokenPruning-v0`, one that prunes the other tokens in parts earns more, because the shares
    saved per step add up; and there an untrained policy falls far below doing nothing.

    ## Render
    "rgb_array" gives the picture with pruned tokens faded and kept regions outlined above a
    caption (step, count, score, question, reference answer), the same size for every sample;
    "ansi" gives the token grid as text.

    ## References
    TPRL: token pruning as a sequential decision process, eq. 2-6 and section 3.2. The budget in
    the observation follows GRIP-VLM.

    ## Version History
    - v0: initial version.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 - Gymnasium's own declaration
        "render_modes": list(RENDER_MODES),
        "render_fps": 1,
    }

    def __init__(
        self,
        source: str | Path | TokenSource = "toy",
        scorer: ScorerLike | None = None,
        *,
        max_steps: int = 3,
        alpha: float = 1.0,
        beta: float = 0.1,
        score_steps: ScoreSteps = "all",
        reward_batch_size: int = 1,
        min_tokens: int = 1,
        budget: int | float | tuple[int, int] | tuple[float, float] | None = None,
        score_kind: ScoreKind = "exact",
        query: Query = "mean",
        render_mode: str | None = None,
    ) -> None:
        """Open the source; see the class for the arguments.

        Raises:
            ValueError: If an argument is out of range or the arguments do not fit together.
        """
        self.rules = EpisodeRules(
            max_steps=max_steps,
            alpha=alpha,
            beta=beta,
            score_steps=score_steps,
            reward_batch_size=reward_batch_size,
            min_tokens=min_tokens,
            budget=budget,
            score_kind=score_kind,
            query=query,
        )
        if reward_batch_size != 1:
            raise ValueError(
                f"reward_batch_size must be 1 here, got {reward_batch_size}; a shared reward needs "
                "several episodes, use TokenPruningVectorEnv"
            )
        if render_mode is not None:
            check_choice("render_mode", render_mode, RENDER_MODES)
        self.render_mode = render_mode
        self.source, self.scorer = open_environment(source, scorer, self.rules)
        self.observation_space = self.rules.observation_space(self.source)
        self.action_space = gymnasium.spaces.MultiBinary(self.source.max_tokens)
        self._episodes = Episodes(self.source, self.scorer, self.rules, 1)
        self._started = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: Seeds the generator that draws samples and budgets.
            options: "sample": int, the sample number; "budget": int, the wanted count.

        Returns:
            Observation and information.

        Raises:
            ValueError: For an unknown option or one out of range.
        """
        super().reset(seed=seed)
        given = check_options(options, self.rules)
        sample, budget = choose_episode(
            self.np_random, self.source, self.rules, given.get("sample"), given.get("budget")
        )
        self._episodes.start(_FIRST, np.array([sample]), np.array([budget]))
        self._started = True
        return self._observation(), self._info()

    def step(
        self, action: npt.ArrayLike
    ) -> tuple[dict[str, npt.NDArray[Any]], float, bool, bool, dict[str, Any]]:
        """Prune, score and reward (TPRL eq. 2-6).

        Args:
            action: (N,) of 0 and 1, see Action Space.

        Returns:
            Observation, reward, terminated, truncated (always False), information.

        Raises:
            ValueError: For an action that is not 0/1 of shape (N,).
            ScoringError: If the scorer fails; the state is then as before the call.
            gymnasium.error.ResetNeeded: Before `reset` and after the end of an episode.
        """
        if not self._episodes.live[0]:
            raise gymnasium.error.ResetNeeded(
                "the episode has ended, call reset() before step()"
                if self._started
                else "no episode has begun, call reset() before step()"
            )
        keep = coerce_action(action, (self.source.max_tokens,))
        reward, ended = self._episodes.advance(keep[None])
        return self._observation(), float(reward[0]), bool(ended[0]), False, self._info()

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Allowed values per bit for sb3-contrib: bool (2 N,), [may be 0, may be 1] per token.

        Dead tokens may only be 0.
        """
        masks = np.ones((self.source.max_tokens, 2), bool)
        masks[:, 1] = self._episodes.alive[0]
        return masks.reshape(-1)

    def reference_returns(self, episodes: int = 256, seed: int = 0) -> dict[str, float]:
        """Mean undiscounted returns of fixed rules: what a learned policy has to beat.

        The running episode and its random numbers are not touched.

        Args:
            episodes: Episodes per rule; passes over the source in random order.
            seed: Seeds the episodes and the random rule.

        Returns:
            "keep_all", "random" (each token kept with probability 1/2 in each step) and, where the
            source knows which tokens are relevant, "best_rule" (these and no others are kept from
            the first step on).

        Raises:
            ValueError: If an argument is out of range.
            ScoringError: If the scorer fails.
        """
        return reference_returns(self.source, self.scorer, self.rules, episodes, seed)

    def render(self) -> Any:
        """Draw the present state: uint8 (H, W, 3) or a string, by `render_mode`.

        Raises:
            gymnasium.error.ResetNeeded: Before the first `reset`.
        """
        if self.render_mode is None:
            gymnasium.logger.warn(
                "render() without a render_mode returns None; make the environment with "
                'render_mode="rgb_array" or "ansi"'
            )
            return None
        if not self._started:
            raise gymnasium.error.ResetNeeded("no episode has begun, call reset() before render()")
        from tprl_env.env.render import episode_frame

        return episode_frame(self._episodes, 0, self.render_mode)

    def _observation(self) -> dict[str, npt.NDArray[Any]]:
        return {name: values[0] for name, values in self._episodes.observation().items()}

    def _info(self) -> dict[str, Any]:
        return {
            name: values[0] if values.ndim > 1 or values.dtype == object else values[0].item()
            for name, (values, known) in self._episodes.info().items()
            if known[0]
        }
