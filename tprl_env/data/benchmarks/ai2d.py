"""AI2D (Kembhavi et al. 2016): diagrams with four options."""

from tprl_env.data.benchmarks.benchmark import LETTERS, Benchmark, Item, Row, with_options


def read(row: Row) -> Item:
    """One question; the answer is the number of an option. Its place is the id."""
    question = with_options(str(row["question"]), list(map(str, row["options"])))
    return Item(str(row["place"]), [row["image"]], question, (LETTERS[int(row["answer"])],))


BENCHMARK = Benchmark(
    title="AI2D",
    hub="lmms-lab/ai2d",
    splits={"test": (None, "test")},
    columns=("question", "options", "answer", "image"),
    read=read,
    grader="letter",
)
