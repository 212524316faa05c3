"""Fewer visual tokens for Qwen2.5-VL: several pictures in one prompt, streamed.

    python examples/qwen2_5_vl.py Qwen/Qwen2.5-VL-7B-Instruct a.png b.png \
        --question "What differs?"

`AutoProcessor` does what `prepare` does where torchvision is installed (Qwen's processor imports
it for videos); this needs none. The published weights could not be had where this was written, so
it has not been run on them; the tests run it on random weights of the same format.
"""

from __future__ import annotations

import argparse
from typing import Any

from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    TextStreamer,
)

from tprl_env.inference import TokenPruner
from tprl_env.reducers import make_reducer

PLACEHOLDER = "<|image_pad|>"


def prepare(checkpoint: str, words: Any, pictures: list[Any], question: str) -> dict[str, Any]:
    """Ids with a placeholder per visual token, and pixels."""
    images = AutoImageProcessor.from_pretrained(checkpoint)
    made = images(images=pictures, return_tensors="pt")
    content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": question}]
    text = words.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    before, *behind = text.split(PLACEHOLDER)
    for grid, part in zip(made["image_grid_thw"], behind, strict=True):
        before += PLACEHOLDER * (int(grid.prod()) // images.merge_size**2) + part
    return {**words(before, return_tensors="pt"), **made}


def main(arguments: list[str] | None = None) -> str:
    """Answer one question about all pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("pictures", nargs="+")
    parser.add_argument("--question", default="What is shown?")
    parser.add_argument("--pruner", help="folder or hub id of a trained pruner; else DivPrune")
    parser.add_argument("--share", type=float, default=0.2, help="of the visual tokens to keep")
    args = parser.parse_args(arguments)

    model = AutoModelForImageTextToText.from_pretrained(args.checkpoint)
    words = AutoTokenizer.from_pretrained(args.checkpoint)
    if args.pruner:
        pruner = TokenPruner.from_pretrained(args.pruner)
    else:
        pruner = TokenPruner(make_reducer("divprune"))

    pictures = [Image.open(path).convert("RGB") for path in args.pictures]
    inputs = prepare(args.checkpoint, words, pictures, args.question)
    pruned = pruner.prune(model, inputs, budget=args.share)
    print(f"{pruned.counts[0]} of {len(pruned.keep[0])} visual tokens")
    streamer = TextStreamer(words, skip_prompt=True, skip_special_tokens=True)
    written = model.generate(**pruned, max_new_tokens=40, do_sample=False, streamer=streamer)
    new = written[0, pruned["input_ids"].shape[1] :]
    return str(words.decode(new, skip_special_tokens=True))


if __name__ == "__main__":
    main()
