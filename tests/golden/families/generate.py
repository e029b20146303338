"""Makes one tiny random checkpoint per model family, and the logits that transformers gives for it in float32.

    python -m venv venv && venv/bin/pip install -r ../peft/requirements.txt
    venv/bin/python generate.py

For every family: `<name>/config.json` (transformers 4 spelling), `config.v5.json` (the same, transformers 5 spelling),
`model.safetensors`, and `logits.safetensors` with `input_ids` I64 [40] and `logits` F32 [40, vocabulary].
"""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import tiny  # noqa: E402

TOKENS = 40


def common(architecture, model_type, **settings):
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "torch_dtype": "float32",
        "transformers_version": "4.48.0",
        "use_cache": True,
    } | settings


FAMILIES = {
    "mistral": common(
        "MistralForCausalLM",
        "mistral",
        vocab_size=96,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        sliding_window=16,
        tie_word_embeddings=False,
    ),
    "qwen2": common(
        "Qwen2ForCausalLM",
        "qwen2",
        vocab_size=128,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        max_window_layers=2,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        sliding_window=None,
        tie_word_embeddings=True,
        use_sliding_window=False,
    ),
    "qwen3": common(
        "Qwen3ForCausalLM",
        "qwen3",
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        # Wider than hidden_size / num_attention_heads on purpose.
        head_dim=16,
        attention_bias=False,
        max_position_embeddings=128,
        max_window_layers=2,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        rope_scaling=None,
        sliding_window=None,
        tie_word_embeddings=False,
        use_sliding_window=False,
    ),
    "phi3-partial": common(
        "Phi3ForCausalLM",
        "phi3",
        vocab_size=64,
        hidden_size=128,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        # Three quarters of a head of 64: 24 rotation frequencies.
        partial_rotary_factor=0.75,
        max_position_embeddings=128,
        original_max_position_embeddings=128,
        pad_token_id=2,
        rope_scaling=None,
        sliding_window=None,
        tie_word_embeddings=False,
        torch_dtype="bfloat16",
    ),
    "llama3-rope": common(
        "LlamaForCausalLM",
        "llama",
        vocab_size=128,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        attention_bias=False,
        mlp_bias=False,
        max_position_embeddings=256,
        # With this base the three cases of the rule occur: kept, blended, divided.
        rope_theta=10000.0,
        rope_scaling={
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_type": "llama3",
        },
        tie_word_embeddings=True,
    ),
}


def main():
    os.chdir(HERE)
    torch.set_num_threads(1)
    for seed, (name, config) in enumerate(FAMILIES.items(), start=100):
        dtype = getattr(torch, config["torch_dtype"])
        model = tiny.make_checkpoint(name, config, seed, dtype)
        ids = tiny.token_ids(TOKENS, config["vocab_size"], seed)
        save_file({"input_ids": ids, "logits": tiny.logits(model, ids)}, f"{name}/logits.safetensors")
        size = sum(file.stat().st_size for file in Path(name).iterdir())
        print(f"{name}: {size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
