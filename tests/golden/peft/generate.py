"""Records what PEFT and the Hugging Face Trainer do, for the tests of LoRA training and of random order.

    python -m venv venv && venv/bin/pip install -r requirements.txt
    venv/bin/python generate.py

Everything is in float32 on one thread, with plain attention and no dropout. README.md beside this file says what each file
holds. The losses are the ones Olive trains with: the mean over one micro-batch of the cross entropy with labels shifted by
one, and gradient accumulation that averages micro-batches (`accepts_loss_kwargs = False`).
"""

import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, get_scheduler, set_seed

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import tiny  # noqa: E402

VOCABULARY = 256
LENGTH = 32
EXAMPLES = 22
STEPS = 100

CHECKPOINTS = {
    "phi3": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "embd_pdrop": 0.0,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 64,
        "max_position_embeddings": 256,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "original_max_position_embeddings": 64,
        "pad_token_id": 2,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "long_factor": [1.0, 1.1, 1.25, 1.5, 1.9, 2.5, 3.2, 4.0],
            "short_factor": [1.0, 1.0, 1.01, 1.02, 1.03, 1.05, 1.08, 1.1],
            "type": "longrope",
        },
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.43.3",
        "use_cache": True,
        "vocab_size": VOCABULARY,
    },
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "max_position_embeddings": 128,
        "mlp_bias": False,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.48.0",
        "use_cache": True,
        "vocab_size": VOCABULARY,
    },
}

ATTENTION = {"phi3": ["o_proj", "qkv_proj"], "llama": ["k_proj", "o_proj", "q_proj", "v_proj"]}
EVERY = {
    "phi3": ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"],
    "llama": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
}

DEFAULTS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_grad_norm": 1.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "weight_decay": 0.0,
    "seed": 42,
    "data_seed": None,
}

RUNS = {
    "constant": {
        "lora": {"r": 8, "lora_alpha": 8},
        "targets": ATTENTION,
        "examples": EXAMPLES,
    },
    "linear": {
        "lora": {"r": 8, "lora_alpha": 8},
        "targets": ATTENTION,
        "examples": EXAMPLES,
        "training": {"lr_scheduler_type": "linear", "warmup_steps": 10, "seed": 0, "data_seed": 123},
    },
    # 18 examples are five micro-batches: the epoch's last one holds two examples and is a group of its own.
    # The first examples are padded on the right, so micro-batches differ in the number of labels.
    "accumulate": {
        "lora": {"r": 4, "lora_alpha": 16},
        "targets": EVERY,
        "examples": 18,
        "padded": True,
        "training": {
            "gradient_accumulation_steps": 2,
            "max_grad_norm": 0.3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 7,
            "seed": 7,
            "learning_rate": 3e-3,
        },
    },
    "decay": {
        "lora": {"r": 4, "lora_alpha": 4, "use_rslora": True},
        "targets": EVERY,
        "examples": EXAMPLES,
        "training": {"weight_decay": 0.1, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "max_grad_norm": 0.0, "seed": 1},
    },
    "dora": {
        "lora": {"r": 4, "lora_alpha": 8, "use_dora": True},
        "targets": EVERY,
        "examples": EXAMPLES,
        "training": {"max_steps": 24, "weight_decay": 0.01, "seed": 3},
    },
}


# ---------------------------------------------------------------------------------------------------------- examples

def make_examples(seed):
    """Rows of tokens with something to learn: a few favoured tokens, each with one likely successor."""
    generator = torch.Generator().manual_seed(seed)
    favoured = torch.randperm(VOCABULARY - 3, generator=generator)[:24] + 3
    successor = torch.randperm(24, generator=generator)
    rows = []
    for _ in range(EXAMPLES):
        at = int(torch.randint(24, (1,), generator=generator))
        row = []
        for _ in range(LENGTH):
            row.append(int(favoured[at]))
            jump = torch.rand((), generator=generator) < 0.2
            at = int(torch.randint(24, (1,), generator=generator)) if jump else int(successor[at])
        rows.append(row)
    lengths = [LENGTH - 5 * (index % 4) - index % 3 if index % 3 != 2 else LENGTH for index in range(EXAMPLES)]
    return {"input_ids": rows, "padded_lengths": lengths}


class Examples(Dataset):
    def __init__(self, examples, count, padded, pad):
        self.rows = []
        for index in range(count):
            ids = examples["input_ids"][index]
            keep = examples["padded_lengths"][index] if padded else LENGTH
            missing = LENGTH - keep
            self.rows.append(
                {
                    "index": index,
                    "input_ids": ids[:keep] + [pad] * missing,
                    "labels": ids[:keep] + [-100] * missing,
                    "attention_mask": [1] * keep + [0] * missing,
                }
            )

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def collate(rows):
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


# ---------------------------------------------------------------------------------------------------------- training

class RecordingTrainer(Trainer):
    """Notes the examples and the loss of every micro-batch."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        order = inputs.pop("index").tolist()
        outcome = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        loss = outcome[0] if return_outputs else outcome
        self.micro_batches.append((order, loss.item()))
        return outcome


class RecordSteps(TrainerCallback):
    def __init__(self, trainer, record):
        self.trainer, self.record = trainer, record

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.record["learning_rate"].append(optimizer.param_groups[0]["lr"])
        taken = self.trainer.micro_batches
        self.record["order"].append([order for order, _ in taken])
        losses = [loss for _, loss in taken]
        self.record["micro_losses"].append(losses)
        self.record["loss"].append(sum(losses) / len(losses))
        self.trainer.micro_batches = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "grad_norm" in logs:
            self.record["grad_norm"].append(float(logs["grad_norm"]))
        if "loss" in logs:
            step = len(self.record["loss"]) - 1
            assert abs(logs["loss"] - self.record["loss"][step]) < 1e-4, "the trainer reports another loss"
            assert logs["learning_rate"] == self.record["learning_rate"][step], "the trainer reports another rate"


def train(checkpoint, adapter, dataset, settings, dtype):
    """One training run from the adapter in the folder; gives the record and the trained model."""
    base = tiny.load(checkpoint, dtype)
    # What Olive sets, so that the trainer averages micro-batches instead of weighting them by their tokens.
    base.accepts_loss_kwargs = False
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True, autocast_adapter_dtype=False)
    model.accepts_loss_kwargs = False
    model.to(dtype)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            optim="adamw_torch",
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            disable_tqdm=True,
            use_cpu=True,
            dataloader_num_workers=0,
            gradient_checkpointing=False,
            **settings,
        )
        trainer = RecordingTrainer(model=model, args=arguments, train_dataset=dataset, data_collator=collate)
        assert not trainer.model_accepts_loss_kwargs
        trainer.micro_batches = []
        record = {"loss": [], "grad_norm": [], "learning_rate": [], "micro_losses": [], "order": []}
        trainer.add_callback(RecordSteps(trainer, record))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    if settings["max_grad_norm"] == 0.0:
        record["grad_norm"] = None
    return record, model.eval()


def tidy_adapter(folder, base):
    """Leaves the two files that matter, with the set of target modules in a fixed order."""
    (Path(folder) / "README.md").unlink(missing_ok=True)
    path = Path(folder) / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"] = sorted(config["target_modules"])
    config["base_model_name_or_path"] = base
    path.write_text(json.dumps(config, indent=2, sort_keys=True))


def expected_order(count, settings):
    """The order in which the trainer takes the examples: a fresh permutation for every epoch."""
    seed = settings["seed"] if settings["data_seed"] is None else settings["data_seed"]
    epoch = 0
    while True:
        generator = torch.Generator().manual_seed(seed + epoch)
        permutation = torch.randperm(count, generator=generator).tolist()
        batch = settings["per_device_train_batch_size"]
        batches = [permutation[at : at + batch] for at in range(0, count, batch)]
        group = settings["gradient_accumulation_steps"]
        yield from (batches[at : at + group] for at in range(0, len(batches), group))
        epoch += 1


def make_run(checkpoint, name, run, examples):
    folder = Path("runs") / f"{checkpoint}-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    settings = DEFAULTS | run.get("training", {})
    pad = CHECKPOINTS[checkpoint]["eos_token_id"]
    dataset = Examples(examples, run["examples"], run.get("padded", False), pad)

    set_seed(settings["seed"])
    lora = LoraConfig(
        task_type="CAUSAL_LM", lora_dropout=0.0, bias="none", target_modules=run["targets"][checkpoint], **run["lora"]
    )
    fresh = get_peft_model(tiny.load(checkpoint), lora)
    fresh.save_pretrained(folder / "adapter_init")
    tidy_adapter(folder / "adapter_init", checkpoint)

    record, model = train(checkpoint, folder / "adapter_init", dataset, settings, torch.float32)
    model.save_pretrained(folder / "adapter_final", save_embedding_layers=False)
    tidy_adapter(folder / "adapter_final", checkpoint)
    before, after = (load_file(folder / part / "adapter_model.safetensors") for part in ("adapter_init", "adapter_final"))
    assert before.keys() == after.keys()

    expected = expected_order(run["examples"], settings)
    assert all(next(expected) == step for step in record["order"]), "the trainer took the examples in another order"

    double, _ = train(checkpoint, folder / "adapter_init", dataset, settings, torch.float64)
    noise = max(abs(a - b) for a, b in zip(record["loss"], double["loss"]))
    assert noise < 2e-5, f"{folder}: float32 is {noise} away from float64; the curve is too sensitive to be a test"

    curve = {
        "checkpoint": checkpoint,
        "examples": run["examples"],
        "padded": run.get("padded", False),
        "lora": {
            "r": lora.r,
            "lora_alpha": lora.lora_alpha,
            "use_rslora": lora.use_rslora,
            "lora_dropout": 0.0,
            "target_modules": run["targets"][checkpoint],
        }
        | ({"use_dora": True} if lora.use_dora else {}),
        "training": settings,
        "float64_max_loss_difference": noise,
    } | record
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in curve.items()]
    (folder / "curve.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")

    ids = torch.tensor(examples["input_ids"][EXAMPLES - 1][:16])
    save_file({"input_ids": ids, "logits": tiny.logits(model, ids)}, folder / "adapted_logits.safetensors")
    print(f"{folder}: loss {record['loss'][0]:.4f} -> {record['loss'][-1]:.4f}, float64 differs by {noise:.1e}")


# ----------------------------------------------------------------------------------------------- numbers without a model

SCHEDULES = {
    "constant": {},
    "constant_with_warmup": {},
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"num_cycles": 3},
    "polynomial": {"lr_end": 1e-5, "power": 2.0},
    "inverse_sqrt": {},
    "warmup_stable_decay": {"num_decay_steps": 12},
}


def make_schedules(steps=40, rate=2e-4):
    records = []
    for name, options in SCHEDULES.items():
        for warmup in (0, 7):
            optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=rate)
            schedule = get_scheduler(
                name, optimizer, num_warmup_steps=warmup, num_training_steps=steps, scheduler_specific_kwargs=options
            )
            rates = []
            for _ in range(steps):
                rates.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                schedule.step()
            records.append({"name": name, "options": options, "warmup_steps": warmup, "learning_rate": rates})
    body = ",\n  ".join(json.dumps(record) for record in records)
    Path("schedules.json").write_text(
        f'{{\n "base_learning_rate": {rate},\n "training_steps": {steps},\n "schedules": [\n  {body}\n ]\n}}\n'
    )


def make_random_numbers():
    """Sequences of torch's and of Python's generator, both mt19937."""
    seeds = (0, 42, 43, 123)
    permutations, uniform, randint = [], [], []
    for seed in seeds:
        for n in (1, 2, 7, 19, 100, 1000):
            generator = torch.Generator().manual_seed(seed)
            permutations.append({"seed": seed, "n": n, "values": torch.randperm(n, generator=generator).tolist()})
            source = random.Random(seed)
            randint.append({"seed": seed, "high": n - 1, "values": [source.randint(0, n - 1) for _ in range(32)]})
        generator = torch.Generator().manual_seed(seed)
        values = torch.empty(24).uniform_(-0.125, 0.125, generator=generator).tolist()
        uniform.append({"seed": seed, "low": -0.125, "high": 0.125, "values": values})
    # One generator for draws of several widths, beyond 32 bits too.
    source, mixed = random.Random(42), []
    for high in (0, 1, 9, 255, 256, 99_999, 2**31, 2**32, 2**40) * 3:
        mixed.append([high, source.randint(0, high)])
    groups = {
        "torch_randperm": permutations,
        "torch_uniform_float32": uniform,
        "python_randint": randint,
        "python_randint_mixed": [{"seed": 42, "high_and_value": mixed}],
    }
    text = ",\n".join(
        f" {json.dumps(name)}: [\n  " + ",\n  ".join(json.dumps(row) for row in rows) + "\n ]" for name, rows in groups.items()
    )
    Path("../rng.json").write_text("{\n" + text + "\n}\n")


# --------------------------------------------------------------------------------------------------------------- main

def make_logits(checkpoint, model, seed):
    """Logits for two prompts; for Phi-3 the second is longer than `original_max_position_embeddings`."""
    tensors = {}
    for name, count in (("short", 24), ("long", 80)):
        ids = tiny.token_ids(count, VOCABULARY, seed)
        tensors[f"{name}.input_ids"] = ids
        tensors[f"{name}.logits"] = tiny.logits(model, ids)
    if checkpoint == "phi3":
        head = tensors["long.input_ids"][:24]
        change = (tiny.logits(model, head) - tensors["long.logits"][:24]).abs().max()
        assert change > 1e-3, "the long prompt does not use the long factors"
    save_file(tensors, f"{checkpoint}/logits.safetensors")


def main():
    os.chdir(HERE)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    make_random_numbers()
    make_schedules()
    for seed, (checkpoint, config) in enumerate(CHECKPOINTS.items(), start=10):
        model = tiny.make_checkpoint(checkpoint, config, seed)
        make_logits(checkpoint, model, seed)
        examples = make_examples(seed)
        rows = ",\n  ".join(json.dumps(row) for row in examples["input_ids"])
        Path(checkpoint, "examples.json").write_text(
            f'{{\n "input_ids": [\n  {rows}\n ],\n "padded_lengths": {json.dumps(examples["padded_lengths"])}\n}}\n'
        )
        for name, run in RUNS.items():
            make_run(checkpoint, name, run, examples)


if __name__ == "__main__":
    main()
