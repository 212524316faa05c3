"""Flickr30k (Young et al. 2014): captions, graded by CIDEr-D."""

from tprl_env.data.benchmarks.benchmark import Benchmark, Item, Row
from tprl_env.data.benchmarks.fields import texts
from tprl_env.data.graders import sets

_ASK = "Provide a one-sentence caption for the provided image."


def read(row: Row) -> Item:
    """One picture."""
    return Item(str(row["img_id"]), [row["image"]], _ASK, texts(row["caption"]))


BENCHMARK = Benchmark(
    title="Flickr30k",
    hub="lmms-lab/flickr30k",
    splits={"test": (None, "test")},
    columns=("image", "caption", "img_id"),
    read=read,
    grader="exact",
    metric=sets.captions,
    max_new_tokens=48,
    note="CIDEr-D with words split at spaces; COCO's evaluation splits them with a Java program",
)
