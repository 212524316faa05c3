"""What published budgets mean in average tokens per layer, and which papers methods name."""

from __future__ import annotations

import re

import pytest

from tprl_env.lvlm.flops import average_tokens, lengths_of_stages
from tprl_env.reducers import REDUCERS
from tprl_env.reducers.layer import FastV, PyramidDrop, SparseVLM
from tprl_env.reducers.layer.schedule import exact_count
from tprl_env.reducers.layer_pruner import Stage
from tprl_env.reducers.merge.visionzip import VisionZip

TOKENS, LAYERS = 576, 32
CONFIRMED = {"2412.01818", "2210.09461", "2410.04417", "2410.17247", "2509.23931"}


def achieved(stages):
    return average_tokens(lengths_of_stages(stages, TOKENS, LAYERS))


@pytest.mark.parametrize(("average", "kept"), [(192, 166.4), (128, 98.1), (64, 29.9)])
def test_fastv(average, kept):
    """Two full layers are dear: (average * 32 - 2 * 576) / 30 tokens are left for the others."""
    assert exact_count(TOKENS, LAYERS, 2, average) == pytest.approx(kept, abs=0.05)
    stages = FastV().stages(TOKENS, LAYERS, average)
    assert stages == (Stage(2, round(kept)),)
    assert achieved(stages) == pytest.approx(average, abs=0.5)


def test_pyramiddrop():
    stages = PyramidDrop().stages(TOKENS, LAYERS)
    assert stages == (Stage(8, 288), Stage(16, 144), Stage(24, 72))
    assert achieved(stages) == 270


def test_sparsevlm():
    """The list called 192 is 191 as its paper counts and 202.75 where its code drops."""
    paper = SparseVLM("v1", layers=(2, 6, 16), depth=None)
    code = SparseVLM("v1")
    assert code.layers == (3, 7, 16)
    for method, average in ((paper, 191), (code, 202.75)):
        stages = method.stages(TOKENS, LAYERS)
        assert [stage.keep for stage in stages[1:]] == [300, 200, 110]
        assert achieved(stages) == average
    assert achieved(SparseVLM("v2", layers=(2, 6, 16), depth=None).stages(TOKENS, LAYERS)) == 195


def test_visionzip():
    """191 dominant tokens are 190 patches and the CLS token; 30 contextual ones come on top."""
    dominant, contextual = 191, 30
    patches = dominant - 1
    assert patches + 1 + contextual == 221
    # our budget counts all that the LLM sees
    method = VisionZip(contextual=contextual)
    assert method.split(221) == (patches, contextual)


def test_papers_are_a_title_a_year_and_a_confirmed_id():
    form = re.compile(r"\S.{10,}, (?:[A-Z]{4}|NeurIPS|COLING)?\s?20\d\d(?:, arXiv (\d{4}\.\d{5}))?")
    named = {name: cls.paper for name, cls in REDUCERS.items() if cls.paper}
    assert {"tome", "visionzip", "cls_attention", "cdpruner"} <= named.keys()
    from tprl_env.reducers.layer import LAYER_PRUNERS

    named |= {name: cls.paper for name, cls in LAYER_PRUNERS.items() if cls.paper}
    for name, paper in named.items():
        found = form.fullmatch(paper)
        assert found, (name, paper)
        assert found[1] is None or found[1] in CONFIRMED, (name, paper)
