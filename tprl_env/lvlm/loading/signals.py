"""Signals of the vision tower on request, and runs of it with something between its blocks.

Queries, keys and values come from the states that enter a block and the block's own projections,
so the tower keeps its fused attention and nothing is patched.

Shapes: L places of the tower, Dv tower width, m features, D token width, t places left.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tprl_env.reducers.vision import BlockView, Step


class TowerSignals:
    """A :class:`~tprl_env.reducers.vision.VisionSignals` of one prepared picture.

    Attributes:
        cls: Whether the tower has a CLS token.
        blocks: Number of blocks.
        last_block: Block that makes the features that the LLM gets.
        cls_block: Block whose CLS attention methods read.
    """

    def __init__(
        self,
        tower: Any,
        projector: Any,
        pixels: Tensor,
        feature_layers: list[int],
        cls: bool,
        cls_layer: int,
    ) -> None:
        """Hold one picture.

        Args:
            tower: The vision tower.
            projector: From features to tokens.
            pixels: (1, 3, H, W) as the tower takes them.
            feature_layers: Entries of the tower's hidden states that make the features.
            cls: Whether place 0 of the tower is CLS.
            cls_layer: Block whose CLS attention methods read.
        """
        self._tower, self._projector, self._pixels = tower, projector, pixels
        self._stack = list(getattr(tower, "vision_model", tower).encoder.layers)
        self._layers = feature_layers
        self.cls, self.blocks = cls, len(self._stack)
        self.last_block = feature_layers[-1] % (self.blocks + 1) - 1
        self.cls_block = cls_layer % self.blocks
        self._states: tuple[Tensor, ...] | None = None

    @torch.inference_mode()
    def features(self) -> Tensor:
        """(L, Dv) float32 features; CLS first where there is one."""
        states = self._hidden()
        return torch.cat([states[layer][0] for layer in self._layers], -1).float()

    @torch.inference_mode()
    def block(self, number: int) -> BlockView:
        """Queries, keys and values of one block.

        Raises:
            ValueError: There is no such block.
        """
        if not -self.blocks <= number < self.blocks:
            raise ValueError(f"the vision tower has blocks 0 to {self.blocks - 1}, got {number}")
        number %= self.blocks
        return self._view(self._stack[number], self._hidden()[number], None)[0]

    @torch.inference_mode()
    def project(self, features: Tensor) -> Tensor:
        """(m, D) float32 tokens for (m, Dv) features."""
        weight = next(self._projector.parameters())
        return self._projector(features.to(weight.device, weight.dtype)[None])[0].float()  # type: ignore[no-any-return]

    @torch.inference_mode()
    def run(self, step: Step) -> Tensor:
        """Features (t, Dv) float32 after ``last_block``, with ``step`` inside every block.

        Raises:
            ValueError: The LLM gets the features of several layers, whose tokens would differ.
        """
        if len(self._layers) > 1:
            raise ValueError(
                f"methods inside the tower need features of one layer, got {self._layers}"
            )
        states, bias = self._hidden()[0], None
        for number, layer in enumerate(self._stack[: self.last_block + 1]):
            view, normed = self._view(layer, states, bias)
            mask = None if bias is None else self._mask(bias, normed)
            mixed = layer.self_attn(normed, attention_mask=mask)[0]
            kept, bias = step(number, view, (states + mixed)[0])
            states = kept[None].to(normed.dtype)
            states = states + layer.mlp(layer.layer_norm2(states))
        return states[0].float()

    def _hidden(self) -> tuple[Tensor, ...]:
        if self._states is None:
            self._states = self._tower(self._pixels, output_hidden_states=True).hidden_states
        return self._states

    def _view(self, layer: Any, states: Tensor, bias: Tensor | None) -> tuple[BlockView, Tensor]:
        normed = layer.layer_norm1(states)
        attention = layer.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        heads = [
            one(normed)[0].float().unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
            for one in projections
        ]
        return BlockView(heads[0], heads[1], heads[2], self.cls, bias), normed

    @staticmethod
    def _mask(bias: Tensor, states: Tensor) -> Tensor:
        count = states.shape[1]
        return bias.to(states.dtype).expand(1, 1, count, count)
