"""Prompts, answers, fingerprints, and what is refused before any weight is loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from lvlm_fixtures import (
    LLAVA15_CHAT_TEMPLATE,
    NUM_TOKENS,
    QUESTIONS,
    byte_tokenizer,
    pictures,
    save_llava,
    word_tokenizer,
)
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from tprl_env.lvlm import load_lvlm
from tprl_env.lvlm.families.llava import LlavaLVLM
from tprl_env.lvlm.loading.checkpoint import folder_fingerprint
from tprl_env.lvlm.protocol import Prompt
from tprl_env.lvlm.tiny import builtin_path

torch.set_num_threads(1)
EOS = 2


@pytest.fixture(scope="module")
def word_folder(tmp_path_factory):
    return save_llava(tmp_path_factory.mktemp("word"), cls_attention_layer=-1)


@pytest.fixture(scope="module")
def word_lvlm(word_folder):
    return load_lvlm(word_folder, device="cpu")


@pytest.fixture(scope="module")
def byte_folder(tmp_path_factory):
    """Like LLaVA-1.5's folder: chat template, byte-level words, layer -2 for everything."""
    folder = tmp_path_factory.mktemp("byte")
    return save_llava(
        folder, tokenizer=byte_tokenizer(), chat_template=LLAVA15_CHAT_TEMPLATE, seed=1
    )


@pytest.fixture(scope="module", params=["word", "byte"])
def folder(request, word_folder, byte_folder):
    return {"word": word_folder, "byte": byte_folder}[request.param]


@pytest.fixture(scope="module")
def lvlm(folder):
    return load_lvlm(folder, device="cpu")


def test_prompt_is_what_the_template_gives(lvlm, folder):
    tokenizer = LlavaProcessor.from_pretrained(folder).tokenizer
    for question in QUESTIONS:
        prompt = lvlm.prompt(f"  {question} ")
        text = f"USER: <image>\n{question} ASSISTANT:"
        assert prompt.text.strip() == text
        ids = list(prompt.ids)
        assert ids == [1, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        assert ids.count(1) == 1 and ids.count(4) == 1 and ids[prompt.visual_at[0]] == 4
        start, stop = prompt.question_span
        assert tokenizer.decode(ids[start:stop]).strip() == question
        assert "USER" not in tokenizer.decode(ids[start:stop])


@pytest.mark.parametrize("bos", ["prepended", "named", "none"])
@pytest.mark.parametrize("template", ["without", "with", "no"])
def test_ids_are_those_of_the_checkpoint_s_own_processor(tmp_path, bos, template):
    """A BOS that the checkpoint was not trained with shifts every place of the prompt."""
    chat = {"no": None, "without": LLAVA15_CHAT_TEMPLATE, "with": "<s> " + LLAVA15_CHAT_TEMPLATE}
    tokenizer = word_tokenizer(bos)
    folder = save_llava(tmp_path / "c", tokenizer=tokenizer, chat_template=chat[template])
    processor = LlavaProcessor.from_pretrained(folder)
    found = load_lvlm(folder, device="cpu").prompt(QUESTIONS[0])
    picture = Image.fromarray(pictures(1)[0])
    if template == "no":
        text = f"USER: <image>\n{QUESTIONS[0]} ASSISTANT:"
        batch = processor(text=text, images=[picture])
    else:
        content = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTIONS[0]}]
        batch = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )
    at = found.visual_at[0]
    expanded = [*found.ids[:at], *[4] * NUM_TOKENS, *found.ids[at + 1 :]]
    assert [expanded] == [list(ids) for ids in batch["input_ids"]]
    begins = {"prepended": True, "named": template == "with", "none": template == "with"}[bos]
    assert (found.ids[0] == 1) == begins
    assert found.ids[found.visual_at[0]] == 4
    start, stop = found.question_span
    assert processor.tokenizer.decode(found.ids[start:stop]) == QUESTIONS[0]


def test_question_span_is_not_fooled_by_template_words(word_lvlm):
    prompt = word_lvlm.prompt("USER: USER: ASSISTANT:")
    assert prompt.question_span == (3, 6)
    assert len(prompt.ids) == 7


def test_question_embeddings(lvlm, folder):
    plain = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    prompt = lvlm.prompt(QUESTIONS[0])
    ids = torch.tensor(prompt.ids[slice(*prompt.question_span)])
    embedded = lvlm.question_embeddings(prompt)
    assert embedded.dtype == torch.float32
    torch.testing.assert_close(embedded, plain.get_input_embeddings()(ids))


def test_answer_ids_follow_the_joint_tokenisation(lvlm, folder):
    tokenizer = LlavaProcessor.from_pretrained(folder).tokenizer
    prompt = lvlm.prompt(QUESTIONS[0])
    for answer in ("7", "red c1", " yes "):
        ids = lvlm.answer_ids(prompt, answer)
        assert ids[-1] == EOS
        joint = tokenizer(f"{prompt.text.strip()} {answer.strip()}", add_special_tokens=False)
        assert [*prompt.ids[1:], *ids[:-1]] == joint["input_ids"]


def test_prompt_and_answer_errors(word_lvlm):
    prompt = word_lvlm.prompt(QUESTIONS[0])
    with pytest.raises(ValueError, match="question is empty"):
        word_lvlm.prompt(" ")
    with pytest.raises(ValueError, match="contains the image placeholder '<image>'"):
        word_lvlm.prompt("what is <image> ?")
    with pytest.raises(ValueError, match="vocabulary cannot express it"):
        word_lvlm.answer_ids(prompt, "zebra")
    with pytest.raises(ValueError, match="neither may be empty"):
        word_lvlm.answer_ids(prompt, "")
    with pytest.raises(ValueError, match="covers the image placeholder"):
        Prompt((1, 4, 5), (1,), (1, 3))
    with pytest.raises(ValueError, match="must lie inside"):
        Prompt((1, 4, 5), (1,), (2, 2))


def test_fingerprint_follows_weights_and_config(word_folder, tmp_path):
    first = load_lvlm(word_folder, device="cpu").fingerprint
    assert first.startswith("sha256:") and len(first) == 71
    copy = shutil.copytree(word_folder, tmp_path / "copy")
    (copy / "README.md").write_text("notes")
    assert load_lvlm(copy, device="cpu").fingerprint == first
    config = json.loads((copy / "config.json").read_text())
    config["cls_attention_layer"] = -2
    (copy / "config.json").write_text(json.dumps(config))
    assert load_lvlm(copy, device="cpu").fingerprint != first
    other = save_llava(tmp_path / "other", cls_attention_layer=-1, seed=5)
    assert load_lvlm(other, device="cpu").fingerprint != first


def test_only_what_is_loaded_counts(word_folder, tmp_path):
    """A stranger's file made every store "encoded by another LVLM"."""
    first = load_lvlm(word_folder, device="cpu").fingerprint
    copy = shutil.copytree(word_folder, tmp_path / "copy")
    (copy / "notes.txt").write_text("mine")
    (copy / "results.json").write_text("{}")
    (copy / "training.json").write_text('{"lr": 1}')
    (copy / "adapter.safetensors").write_bytes(b"x")
    assert load_lvlm(copy, device="cpu").fingerprint == first
    for name in ("tokenizer.json", "processor_config.json", "generation_config.json"):
        (copy / name).write_text((copy / name).read_text() + "\n")
        assert load_lvlm(copy, device="cpu").fingerprint != first
        shutil.copy(word_folder / name, copy / name)


def test_shards_count_as_the_index_names_them(word_folder, tmp_path):
    copy = shutil.copytree(word_folder, tmp_path / "copy")
    model = LlavaForConditionalGeneration.from_pretrained(copy, dtype=torch.float32)
    (copy / "model.safetensors").unlink()
    model.save_pretrained(copy, max_shard_size="60KB")
    shards = sorted(copy.glob("model-*.safetensors"))
    assert len(shards) > 1
    first = folder_fingerprint(copy)
    (copy / "model-old.safetensors").write_bytes(b"x")
    assert folder_fingerprint(copy) == first == load_lvlm(copy, device="cpu").fingerprint
    shards[-1].write_bytes(shards[-1].read_bytes() + b" ")
    assert folder_fingerprint(copy) != first


@pytest.mark.parametrize(("task", "start"), [("crowded", "be0da68be0"), ("sparse", "6d6304d841")])
def test_stores_of_the_built_in_lvlms_still_open(task, start):
    assert folder_fingerprint(builtin_path(task)).startswith(f"sha256:{start}")


def test_refusals(word_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'\./nowhere' does not exist"):
        load_lvlm("./nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_lvlm(empty)
    pickled = shutil.copytree(word_folder, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    for load in (load_lvlm, LlavaLVLM.from_pretrained):
        with pytest.raises(ValueError, match=r"only pickle files \(pytorch_model\.bin\)"):
            load(pickled)
    bert = shutil.copytree(word_folder, tmp_path / "bert")
    (bert / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(
        ValueError, match=r"model_type 'bert', which cannot be run; known are .*llava"
    ):
        load_lvlm(bert)
    with pytest.raises(ValueError, match=r"model_type 'bert', but LlavaLVLM loads 'llava'"):
        LlavaLVLM.from_pretrained(bert)
    (bert / "config.json").write_text("{")
    with pytest.raises(ValueError, match="no valid JSON"):
        load_lvlm(bert)
    with pytest.raises(ValueError, match="dtype must be like 'float32' or 'bfloat16', got 'int8'"):
        load_lvlm(word_folder, device="cpu", dtype="int8")


SMALL_VOCABULARY = {"text_config": {"model_type": "llama", "vocab_size": 20, "hidden_size": 64}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": {"model_type": "gemma2", "head_dim": 12}}, "'gemma2' language model"),
        ({"text_config": {"model_type": "mistral", "sliding_window": 8}}, "sliding window 8"),
        (
            {"text_config": {"model_type": "mistral", "sliding_window": 8}},
            r"sliding_window to null",
        ),
        ({"text_config": {"model_type": "gemma2"}}, "CLIP and SigLIP towers with Llama, Mistral"),
        ({"text_config": {"model_type": "nonsense"}}, "'nonsense' language model"),
        ({"text_config": 5}, "text_config of config.json must be an object, got 5"),
        ({"vision_config": {"model_type": "resnet"}}, "'resnet' vision tower"),
        ({"vision_config": {"model_type": "vit"}}, r"vision_config.model_type of config.json"),
        ({"vision_config": {"patch_size": "many"}}, r"config.json does not describe a LLaVA \(.*"),
        ({"vision_feature_select_strategy": "full"}, "feeds the CLS token"),
        ({"image_token_index": 999}, "image_token_id 999 .* beyond the vocabulary of 38 embed"),
        ({"image_token_index": -1}, "image_token_id -1 "),
        (SMALL_VOCABULARY, "ids up to 37, but text_config.vocab_size of config.json is 20"),
    ],
)
def test_parts_that_cannot_be_run_are_refused_before_loading(
    word_folder, tmp_path, changes, message
):
    folder = shutil.copytree(word_folder, tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    (folder / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(ValueError, match=message):
        load_lvlm(folder, device="cpu")


def test_a_vocabulary_that_does_not_fit_the_embedding(word_folder, tmp_path):
    folder = shutil.copytree(word_folder, tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = 60
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lm_head.weight \(\(38, 48\) in .*vocab_size"):
        load_lvlm(folder, device="cpu")


def test_a_misspelt_built_in_names_the_nearest():
    for name, nearest in (("spare", "sparse"), ("crowdet", "crowded")):
        with pytest.raises(ValueError, match=rf"LVLM 'builtin:{name}'.*mean 'builtin:{nearest}'"):
            load_lvlm(f"builtin:{name}")


def test_without_transformers_one_line_names_the_cure(word_folder):
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from tprl_env.lvlm import load_lvlm\n"
        f"try: load_lvlm({str(word_folder)!r})\n"
        "except ImportError as error: print(error)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert out.stdout.strip().endswith('pip install "tprl-env[lvlm]"')


# ---------- what the library only reports about loading is refused


def edit_weights(folder, change):
    """Rewrite the checkpoint's weights."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def without(*parts):
    def change(weights):
        for key in [key for key in weights if any(part in key for part in parts)]:
            del weights[key]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("multi_modal_projector"), r"4 missing: .*multi_modal_projector.* and 1 more"),
        (without("lm_head"), r"1 missing: lm_head\.weight; "),
        (without("vision_tower"), r"\d\d missing: .*vision_tower"),
        (without("layers.2.mlp"), r"missing: .*layers\.2\.mlp"),
        (
            lambda weights: weights.update({"language_model.model.extra.weight": torch.ones(2)}),
            r"1 unexpected: .*extra\.weight; ",
        ),
        (
            lambda weights: (
                weights.update({"lm_head.weight": torch.ones(9, 48)})
                or weights.pop("language_model.lm_head.weight", None)
            ),
            r"1 of another shape: lm_head\.weight \(\(9, 48\) in the file, \(\d\d, 48\) by text",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(word_folder, tmp_path, change, message):
    """The library fills what is missing with random numbers: two loads were two models."""
    folder = shutil.copytree(word_folder, tmp_path / "edited")
    edit_weights(folder, change)
    for load in (load_lvlm, LlavaLVLM.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(folder, device="cpu")


def test_a_tied_head_is_not_missing(tmp_path):
    folder = save_llava(tmp_path / "tied", tie_word_embeddings=True)
    edit_weights(folder, without("lm_head"))
    lvlm = load_lvlm(folder, device="cpu")
    assert torch.equal(lvlm._head, lvlm._text.embed_tokens.weight.float())


def test_constants_of_older_releases_are_not_unexpected(word_folder, tmp_path):
    folder = shutil.copytree(word_folder, tmp_path / "older")
    old = {"model.language_model.rotary_emb.inv_freq": torch.ones(6)}
    edit_weights(folder, lambda weights: weights.update(old))
    assert load_lvlm(folder, device="cpu").token_width == 48
