"""Each published method on examples worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from tprl_env.reducers import (
    CDPruner,
    HiPrune,
    Pooled,
    PruMerge,
    PruMergePlus,
    PruneInputs,
    Scope,
    Trim,
    VisionZip,
)
from tprl_env.reducers.merge.flowcut import drops, flow_score, share
from tprl_env.reducers.merge.prumerge import _spread
from tprl_env.reducers.merge.tome import _Groups, _schedule
from tprl_env.reducers.outliers import outlier_count
from tprl_env.reducers.prune.cdpruner import greedy_determinant, scaled
from tprl_env.reducers.prune.holov import HoloV, quotas
from tprl_env.reducers.vision import BlockView

T = torch.tensor


class OneBlock:
    """A tower of one known block, unit features (CLS is the first) and no projection."""

    cls, cls_block, last_block, blocks = True, 0, 0, 1

    def __init__(self, query, keys):
        self.view = BlockView(query[None], keys[None], keys[None], True)

    def features(self):
        return torch.eye(self.view.key.shape[1])

    def block(self, number):
        return self.view

    def project(self, features):
        return features


def test_prumerge():
    # attention of CLS: 1 : 1 : 4 : 2 : 2 of 10
    keys = T([1.0, 1.0, 4.0, 2.0, 2.0]).log()[:, None]
    inputs = PruneInputs(vision=OneBlock(torch.ones(5, 1), keys), grid=(2, 2))
    got = PruMerge(neighbours=1).merge(inputs, 3)
    # 1 absorbs 2 (similar as 3, lower index), 2 absorbs 1 though it is a centre, rest: 0 and 3
    wanted = T([[0, 0, 1, 0.2, 0], [0, 0, 0.4, 1, 0], [0, 0.1, 0, 0, 0.2]])
    torch.testing.assert_close(got.tokens, wanted)
    assert got.places.tolist() == [1, 2, 3]


def test_prumerge_plus_spreads_centres_and_has_guards():
    attention = torch.zeros(12)
    attention[[5, 3, 1]] = T([0.5, 0.3, 0.2])
    # one outlier of 12: s = 12, every 4th; two would be 8 centres, so 3 and 1 fill up to 6
    assert PruMergePlus().centres(attention, 7).tolist() == [5, 3, 1, 0, 4, 8]
    flat = torch.full((12,), 1 / 12)  # ratio 0
    assert PruMergePlus(adaptive=True).centres(flat, 7).tolist() == [0, 4, 8]
    assert PruMerge(adaptive=True).centres(flat, 7).tolist() == [0]
    assert _spread([1, 2, 3, 4, 5], 12) == []  # ratio above 1/3: the step would be 0
    assert 575 not in _spread(list(range(0, 190, 2)), 576)
    assert _spread([3], 576) == [0, 192, 384]


def test_outliers():
    assert outlier_count(T([1.0, 2.0, 3.0, 4.0, 5.0])) == 0
    assert outlier_count(T([1.0, 2.0, 3.0, 4.0, 50.0])) == 1  # Q3 + 1.5 (4 - 2) = 7
    assert outlier_count(torch.ones(9)) == 0


@pytest.mark.parametrize(
    ("contextual", "budget", "split"),
    [(30, 221, (190, 30)), (None, 192, (161, 30)), (None, 128, (107, 20)), (None, 64, (53, 10))],
)
def test_visionzips_accounting(contextual, budget, split):
    patches, others = VisionZip(contextual).split(budget)
    assert (patches, others) == split
    assert patches + 1 + others == budget


def test_visionzip():
    keys = T([[0.0, 0], [3, 0], [0, 1], [0.1, -1], [0, 2]])
    inputs = PruneInputs(vision=OneBlock(T([[1.0, 0]]).expand(5, 2), keys), grid=(2, 2))
    got = VisionZip(contextual=1).merge(inputs, 3)
    wanted = T([[1.0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0.5, 0.5]])
    assert torch.equal(got.tokens, wanted) and got.places.tolist() == [0, 0, 1]
    got = VisionZip(contextual=2).merge(inputs, 4)  # 3 goes to 1, 2 stays alone
    assert torch.equal(got.tokens[2:], T([[0.0, 0, 1, 0, 1], [0, 0, 0, 1, 0]]))
    assert got.places.tolist() == [0, 0, 1, 2]


def test_tome_merges_by_size():
    groups = _Groups(4, False)
    metric = T([[1.0, 0], [1, 0.1], [0, 1], [1, 1]])
    states = groups.merge(T([[1.0], [2], [3], [4]]), metric, 1)  # 0 into 1
    assert states[:, 0].tolist() == [3.0, 1.5, 4.0]
    assert groups.places.tolist() == [2, 1, 3] and groups.sizes.tolist() == [1, 2, 1]
    states = groups.merge(states, T([[0.0, 1], [1, 0], [1, 0.1]]), 1)  # 3 into 0 and 1
    torch.testing.assert_close(states[:, 0], T([3.0, 7 / 3]))
    assert groups.places.tolist() == [2, 1] and groups.sizes.tolist() == [1, 3]
    cls = _Groups(3, True)  # CLS would be the most similar, and stays
    cls.merge(torch.ones(4, 1), T([[1.0, 0], [1, 0], [0, 1], [1, 1]]), 1)
    assert cls.places.tolist() == [-1, 0, 2]


def test_tomes_schedule():
    assert _schedule(576, 24, 384) == [16] * 24
    assert _schedule(16, 5, 6) == [2, 1, 1, 1, 1]
    assert _schedule(16, 4, 15) == [8, 4, 2, 1]
    assert _schedule(16, 3, 0) == [0, 0, 0]


def test_flowcut():
    assert share(T([1.0, 3])).tolist() == [0.25, 0.75]
    assert share(torch.zeros(4)).tolist() == [0.25] * 4
    value = T([[[0.0, 0], [1, 1], [-3, 0]]])
    torch.testing.assert_close(flow_score(T([0.75, 0.25]), value), T([1.25 * 2, 0.75 * 3]))
    one_hot, even = T([1.0, 0, 0, 0]), torch.full((4,), 0.25)
    assert [drops(one_hot, 2, left) for left in (0, 1, 4)] == [2, 2, 1]
    assert [drops(even, 2, left) for left in (0, 2, 4)] == [2, 0, 0]
    half = T([0.5, 0.5, 0, 0])  # H / log 4 = 1/2
    assert drops(half, 0, 1) == round(4 * 0.75)


def test_cdpruner():
    relevance = T([1.0, 0.9, 0.5])
    similarity = T([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])
    kernel = relevance[:, None] * similarity * relevance
    assert greedy_determinant(kernel, relevance, 2).tolist() == [True, False, True]
    assert greedy_determinant(kernel, relevance, 3).all()  # no volume left: relevance fills
    torch.testing.assert_close(scaled(T([2.0, 4.0])), T([0.5e-6, 1 + 0.5e-6]))
    assert scaled(torch.ones(3)).tolist() == [1, 1, 1]
    # CLIP: the least similar patch is the relevant one; "query": the most similar
    tokens = torch.eye(3)
    text = T([[1.0, 0.1, 0]])
    one = PruneInputs(tokens=tokens, clip_image=tokens, clip_text=text, query_tokens=text)
    assert CDPruner().prune(one, 1).tolist() == [False, False, True]
    assert CDPruner(relevance="query").prune(one, 1).tolist() == [True, False, False]


def test_cdpruner_is_the_greedy_determinant():
    g = torch.Generator().manual_seed(0)
    features = torch.randn(7, 9, generator=g, dtype=torch.float64)
    kernel, chosen = features @ features.T, []
    for _ in range(4):
        volume = {
            j: kernel[[*chosen, j]][:, [*chosen, j]].det() for j in range(7) if j not in chosen
        }
        chosen.append(max(volume, key=volume.get))
    keep = greedy_determinant(kernel, torch.ones(7), 4)
    assert keep.nonzero()[:, 0].tolist() == sorted(chosen)


def test_trim():
    vision = OneBlock(torch.ones(5, 1), torch.ones(5, 1))
    tokens = vision.features()[1:]
    image, text = T([[1.0], [3], [2], [0]]), T([[1.0]])
    one = PruneInputs(vision=vision, tokens=tokens, clip_image=image, clip_text=text)
    got = Trim().merge(one, 3)  # 3 and 0 are least similar; the mean of 1 and 2 stands for 2
    assert got.places.tolist() == [0, 3, 2]
    wanted = T([[0.0, 1, 0, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0.5, 0.5, 0]])
    assert torch.equal(got.tokens, wanted)


def test_holov():
    assert quotas([3.0, 1.0], [4, 4], 4) == [3, 1]
    assert quotas([3.0, 1.0], [2, 4], 4) == [2, 2]  # the surplus goes on
    assert quotas([1.0, 1.0, 1.0], [2, 2, 2], 4) == [2, 1, 1]
    assert quotas([0.0, 0.0], [3, 3], 2) == [1, 1]
    # cosine 1/2: variance 1/4 for both, so each gains alpha times the mean of 1000 a
    tokens = T([[1.0, 0], [0.5, math.sqrt(0.75)]])
    assert HoloV(alpha=0.1)._score(tokens, T([0.001, 0.003])) == pytest.approx(2.2)
    assert HoloV()._score(torch.ones(1, 2), T([0.25])) == 0.25
    one = PruneInputs(tokens=torch.ones(4, 2), cls_attention=T([0.1, 0.2, 0.6, 0.1]))
    # equal tokens: S = 1, mu = 1, var = 1; runs score 1.09 x 150 and 1.09 x 350, floor .6 and 1.4
    assert HoloV(crops=2).prune(one, 2).tolist() == [False, False, True, True]


def test_hiprune():
    early, late = torch.zeros(20), torch.arange(20.0)
    early[4] = 1.0
    blocks = {1: early, 2: late}
    vision = SimpleNamespace(
        blocks=3,
        cls_block=2,
        block=lambda number: SimpleNamespace(patch_attention=lambda: blocks[number]),
    )
    one = PruneInputs(vision=vision, grid=(4, 5))
    keep = HiPrune(alpha=0.5).prune(one, 10)
    # the anchor 4 ends its row, yet 5 counts as its neighbour; above it is clamped to place 0
    assert keep.nonzero()[:, 0].tolist() == [0, 3, 4, 5, 9, 15, 16, 17, 18, 19]


def test_scope():
    one = PruneInputs(tower=T([[1.0, 0], [2, 0], [0, 1]]), cls_attention=T([0.2, 0.3, 0.4]))
    assert Scope().prune(one, 1).tolist() == [False, True, False]  # 2 x .3 beats 1 x .4
    assert Scope().prune(one, 2).tolist() == [False, True, True]
    assert Scope(alpha=0.0).prune(one, 2).tolist() == [True, False, True]


def test_pooled():
    one = PruneInputs(tokens=torch.arange(9.0)[:, None], grid=(3, 3))
    got = Pooled(window=2).merge(one, 1)
    assert got.tokens[:, 0].tolist() == [2.0, 3.5, 6.5, 8.0]
    assert got.places.tolist() == [0, 2, 6, 8]
    assert [len(Pooled().merge(one, k).tokens) for k in (1, 2, 3, 5, 7, 9)] == [1, 1, 4, 4, 9, 9]
    with pytest.raises(ValueError, match="needs a full grid"):
        Pooled().merge(PruneInputs(tokens=torch.ones(5, 1), grid=(2, 2)), 2)
