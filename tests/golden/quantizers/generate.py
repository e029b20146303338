"""What Olive's own passes make of the tiny checkpoints in ../families: packed tensors, configs, chosen modules.

    python -m venv venv && venv/bin/pip install -r requirements.txt
    venv/bin/python generate.py

`<case>.safetensors`: the packed tensors that the pass wrote, under the names that Olive 0.13 gives them (of phi3-partial
without the second layer), and for GPTQ also
`calibration` I64 [sequences, tokens]. Its metadata holds `model` (a folder of ../families), `pass`, `config`, and
`quantization_config` as the pass wrote it. `mixed_precision.json`: what SelectiveMixedPrecision chose;
`kld_gradient.json` the same for its calibrated score, with the tokens and the alignment of each module.

`generate.py kld_gradient` makes only the last.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["OLIVE_DISABLE_TELEMETRY"] = "1"
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

HERE = Path(__file__).resolve().parent
FAMILIES = HERE.parent / "families"
torch.set_num_threads(1)

import olive.passes.pytorch.quant_utils as quant_utils  # noqa: E402
import olive.passes.pytorch.selective_mixed_precision as selective  # noqa: E402
from olive.hardware.accelerator import DEFAULT_CPU_ACCELERATOR  # noqa: E402
from olive.model import HfModelHandler  # noqa: E402
from olive.passes.olive_pass import create_pass_from_dict  # noqa: E402
from olive.passes.pytorch.gptq import Gptq  # noqa: E402
from olive.passes.pytorch.kquant import KQuant  # noqa: E402
from olive.passes.pytorch.rtn import Rtn  # noqa: E402
from olive.passes.pytorch.selective_mixed_precision import SelectiveMixedPrecision  # noqa: E402

PASSES = {p.__name__: p for p in (Rtn, KQuant, Gptq, SelectiveMixedPrecision)}

# name, family, pass, config
CASES = [
    ("rtn4", "qwen2", "Rtn", {"bits": 4, "group_size": 16}),
    ("rtn4_sym_row", "mistral", "Rtn", {"bits": 4, "group_size": -1, "sym": True, "lm_head": True}),
    ("rtn8_bf16_ends", "phi3-partial", "Rtn", {"bits": 8, "group_size": 32, "lm_head": True, "embeds": True}),
    ("rtn4_bf16_sym", "phi3-partial", "Rtn", {"bits": 4, "group_size": 32, "sym": True}),
    ("rtn_tied", "llama3-rope", "Rtn", {"bits": 4, "group_size": 32, "lm_head": True, "embeds": True}),
    (
        "rtn_mixed",
        "qwen3",
        "Rtn",
        {
            "bits": 4,
            "group_size": 16,
            "lm_head": True,
            "overrides": {
                "lm_head": {"bits": 8},
                "model.layers.0.self_attn.q_proj": {"bits": 8},
                "model.layers.1.mlp.down_proj": {"group_size": 32, "symmetric": True},
            },
        },
    ),
    ("kquant4", "mistral", "KQuant", {"bits": 4, "group_size": 16}),
    ("kquant4_sym", "qwen2", "KQuant", {"bits": 4, "sym": True, "group_size": 32}),
    ("kquant8_bf16", "phi3-partial", "KQuant", {"bits": 8, "group_size": 32}),
    ("gptq4", "mistral", "Gptq", {"bits": 4, "group_size": 16, "lm_head": True}),
    ("gptq4_row", "qwen2", "Gptq", {"bits": 4, "group_size": -1, "sym": True}),
]
CHOICES = [
    (algorithm, family, ratio)
    for family in ("mistral", "phi3-partial", "qwen2")
    for algorithm, ratio in (
        ("k_quant_last", None),
        ("k_quant_down", None),
        ("k_quant_mixed", None),
        ("snr", 0.7),
        ("snr_relative", 0.7),
        ("iqe", 0.7),
        ("iqe_relative", 0.7),
    )
]


def calibration(family, sequences=6, length=40):
    vocab = json.loads((FAMILIES / family / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, vocab, (sequences, length), generator=generator)


def run(kind, family, config):
    model = HfModelHandler(model_path=str(FAMILIES / family), task="text-generation")
    # The checkpoints have no tokenizer.
    model.save_metadata = lambda path, **_: []
    ids = calibration(family)
    batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
    quant_utils.get_calibration_dataset = selective.get_calibration_dataset = lambda *_, **__: batches
    owned = create_pass_from_dict(PASSES[kind], config, disable_search=True, accelerator_spec=DEFAULT_CPU_ACCELERATOR)
    with tempfile.TemporaryDirectory() as out:
        result = owned._run_for_config(model, owned.config, out)
        if kind == "SelectiveMixedPrecision":
            return result.model_attributes["mixed_precision_info"]
        tensors = {}
        for file in sorted(Path(out).glob("*.safetensors")):
            tensors.update(load_file(file))
        written = json.loads((Path(out) / "config.json").read_text())
    packed = {n: t.contiguous() for n, t in tensors.items() if n.endswith((".qweight", ".qzeros", ".scales"))}
    if family == "phi3-partial":
        # One layer is enough of the larger ones.
        packed = {n: t for n, t in packed.items() if ".layers.1." not in n}
    if kind == "Gptq":
        packed["calibration"] = ids
    return packed, written


def alignments(family, config):
    """What `kld_gradient` makes of every module, and what it chooses."""
    strategy, found = selective._KldGradientStrategy, {}
    whole = strategy.compute_module_stats

    def recorded(self, handler, wrapper, device):
        result = whole(self, handler, wrapper, device)
        found.update({name: stats["alignment"] for name, stats in result[1].items()})
        return result

    strategy.compute_module_stats = recorded
    try:
        chosen = run("SelectiveMixedPrecision", family, config)
    finally:
        strategy.compute_module_stats = whole
    tokens = calibration(family).tolist()
    return {"model": family, "config": config, "calibration": tokens, "alignments": found, "chosen": plain(chosen)}


def kld_gradient():
    cases = []
    for family, high in (("mistral", {}), ("qwen2", {"high_group_size": 32}), ("phi3-partial", {}), ("llama3-rope", {"high_sym": True})):
        config = {"algorithm": "kld_gradient", "group_size": 16, "ratio": 0.7, **high}
        cases.append(alignments(family, config))
    (HERE / "kld_gradient.json").write_text(json.dumps(cases) + "\n")


def plain(value):
    return json.loads(json.dumps(value, default=lambda v: getattr(v, "value", str(v))))


def main():
    for name, family, kind, config in CASES:
        packed, written = run(kind, family, config)
        metadata = {
            "model": family,
            "pass": kind,
            "config": json.dumps(config),
            "quantization_config": json.dumps(written["quantization_config"]),
            "tie_word_embeddings": json.dumps(written.get("tie_word_embeddings")),
        }
        save_file(packed, HERE / f"{name}.safetensors", metadata=metadata)
        os.chmod(HERE / f"{name}.safetensors", 0o644)
        print(name, len(packed), file=sys.stderr)
    chosen = []
    for algorithm, family, ratio in CHOICES:
        config = {"algorithm": algorithm, "group_size": 16, "ratio": ratio}
        info = run("SelectiveMixedPrecision", family, {k: v for k, v in config.items() if v is not None})
        chosen.append({"model": family, "config": config, "chosen": plain(info)})
    (HERE / "mixed_precision.json").write_text(json.dumps(chosen, indent=1) + "\n")
    kld_gradient()


kld_gradient() if sys.argv[1:] == ["kld_gradient"] else main()
