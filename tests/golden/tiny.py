"""Tiny random checkpoints in the Hugging Face layout, and the logits that transformers gives for them.

`config.json` is written in the spelling of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`), which is what most
checkpoints in the world carry; `config.v5.json` beside it is the same model as transformers 5 itself writes it
(`rope_parameters`, `dtype`). A reader has to understand both.
"""

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM


def write_json(path, value, **options):
    Path(path).write_text(json.dumps(value, **options) + "\n")


def load(folder, dtype=torch.float32):
    """The checkpoint as transformers reads it, with plain attention and without dropout."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[problem], f"{folder}: {problem} {report[problem]}"
    return model.eval()


def randomise(model, seed, head_gain):
    """Weights with which every part of the network matters: no bias is zero, no norm weight is one."""
    generator = torch.Generator().manual_seed(seed)
    tied = model.config.tie_word_embeddings
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                value = 1.0 + 0.1 * noise
            elif name.endswith(".bias"):
                value = 0.2 * noise
            elif name.endswith("embed_tokens.weight"):
                value = noise * (head_gain * parameter.shape[1] ** -0.5 if tied else 1.0)
            elif name.endswith("lm_head.weight"):
                value = noise * head_gain * parameter.shape[1] ** -0.5
            else:
                value = noise * parameter.shape[1] ** -0.5
            parameter.copy_(value)


def make_checkpoint(folder, config, seed, dtype=torch.float32, head_gain=1.5):
    """Writes `config.json`, `config.v5.json` and `model.safetensors`, and returns the model as read back."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config, indent=2)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), attn_implementation="eager")
    randomise(model.float(), seed, head_gain)
    model.to(dtype)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with tempfile.TemporaryDirectory() as scratch:
        model.config.save_pretrained(scratch)
        modern = json.loads((Path(scratch) / "config.json").read_text())
    # A leftover of the old spelling, which a model born under transformers 5 does not have.
    modern["rope_parameters"].pop("type", None)
    write_json(folder / "config.v5.json", modern, indent=2)
    return load(folder)


def token_ids(count, vocab, seed):
    return torch.randint(3, vocab, (count,), generator=torch.Generator().manual_seed(seed))


def logits(model, ids):
    """Logits of the whole sequence, [tokens, vocabulary]."""
    with torch.no_grad():
        return model(input_ids=ids[None], use_cache=False).logits[0].float().contiguous()
