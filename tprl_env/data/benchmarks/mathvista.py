"""MathVista (Lu et al. 2023), graded by rules."""

from tprl_env.data.benchmarks.benchmark import Benchmark, Item, Row

_CLOSING = "Answer with a number, a word or the text of an option, and nothing else."


def read(row: Row) -> Item:
    """One question."""
    choices = [str(one) for one in row["choices"] or ()]
    options = [f"Choices: {', '.join(choices)}"] if choices else []
    question = "\n".join([str(row["question"]), *options, _CLOSING])
    category = str(row["question_type"])
    return Item(str(row["pid"]), [row["decoded_image"]], question, (str(row["answer"]),), category)


BENCHMARK = Benchmark(
    title="MathVista (rules)",
    hub="AI4Math/MathVista",
    splits={"test": (None, "testmini")},
    columns=("pid", "question", "decoded_image", "choices", "answer", "question_type"),
    read=read,
    grader="number_or_text",
    max_new_tokens=64,
    note="answers are read out by rules; the benchmark lets a large language model do it",
)
