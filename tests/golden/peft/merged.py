"""Records what PEFT's merge_and_unload makes of random adapters; see README.md. Needs what generate.py needs.

    venv/bin/python merged.py
"""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
os.chdir(HERE)
sys.path.insert(0, str(HERE))
from generate import EVERY, EXAMPLES, tidy_adapter, tiny  # noqa: E402

CASES = {
    "patterns": (
        "phi3",
        torch.float32,
        {
            "r": 6,
            "lora_alpha": 9,
            "use_rslora": True,
            "target_modules": EVERY["phi3"],
            "rank_pattern": {"qkv_proj": 3, r"layers\.1\.mlp\..*": 2},
            "alpha_pattern": {"o_proj": 4, r"layers\.0\.mlp\.down_proj": 12},
            "fan_in_fan_out": True,
        },
    ),
    "expression": (
        "llama",
        torch.float32,
        {"r": 4, "lora_alpha": 10, "target_modules": r".*\.1\.(self_attn\.[qv]_proj|mlp\.down_proj)"},
    ),
    "dora": ("llama", torch.float32, {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": EVERY["llama"]}),
    "dora-half": ("phi3", torch.bfloat16, {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": EVERY["phi3"]}),
    "half": ("llama", torch.bfloat16, {"r": 4, "lora_alpha": 6, "target_modules": EVERY["llama"]}),
}


def randomise(model, seed):
    """`A` and `B` large enough to matter, magnitudes a little away from the norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "lora_A" in name:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
            elif "lora_B" in name:
                parameter.copy_(noise * 0.1)
            elif "lora_magnitude" in name:
                parameter.mul_(1.0 + 0.1 * noise)


def main():
    torch.set_num_threads(1)
    for index, (name, (checkpoint, dtype, options)) in enumerate(CASES.items()):
        folder = Path("merged") / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        model = get_peft_model(tiny.load(checkpoint, dtype), LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **options))
        randomise(model, index)
        model.save_pretrained(folder / "adapter", save_embedding_layers=False)
        path = folder / "adapter" / "adapter_config.json"
        config = json.loads(path.read_text())
        targets = config["target_modules"]
        if isinstance(targets, list):
            tidy_adapter(folder / "adapter", checkpoint)
        else:
            (folder / "adapter" / "README.md").unlink(missing_ok=True)
            config["base_model_name_or_path"] = checkpoint
            path.write_text(json.dumps(config, indent=2, sort_keys=True))
        adapted = {key.split(".lora_")[0].removeprefix("base_model.model.") for key, _ in model.named_parameters() if ".lora_" in key}
        merged = PeftModel.from_pretrained(tiny.load(checkpoint, dtype), folder / "adapter").merge_and_unload()
        state = merged.state_dict()
        save_file({f"{key}.weight": state[f"{key}.weight"].contiguous() for key in sorted(adapted)}, folder / "merged.safetensors")
        examples = json.loads(Path(checkpoint, "examples.json").read_text())
        ids = torch.tensor(examples["input_ids"][EXAMPLES - 1][:16])
        save_file({"input_ids": ids, "logits": tiny.logits(merged, ids)}, folder / "logits.safetensors")
        print(name, len(adapted), "modules")


if __name__ == "__main__":
    main()
