#!/usr/bin/env python3
"""A LoRA step of `olive finetune` against PEFT on torch's CPU: speed, memory, and the time to the first finished step.

    finetune.py OLIVE MODEL TEXT [--threads 1 2] [--repeats 5] [--batch 4] [--length 128] [--rank 16] [--steps 12]
                [--gradient_checkpointing]

Both train the same adapter of the attention in float32 on the same samples, with the same number of threads, one after
the other and again, both with or without gradient checkpointing. A step's seconds are the difference between a long run and one with a single step.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import measure

PEER = ["torch==2.15.0", "transformers==5.23.0", "peft==0.21.2"]

TRAIN = '''
import json, sys, time
started = time.perf_counter()
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
model, data, adapter, batch, length, rank, steps, threads, checkpointing = sys.argv[1:]
batch, length, steps = int(batch), int(length), int(steps)
torch.set_num_threads(int(threads))
torch.manual_seed(0)
dropout = json.load(open(adapter))["lora_dropout"]
tokenizer = AutoTokenizer.from_pretrained(model)
texts = [json.loads(line)["text"] for line in open(data)]
ids = [tokenizer(text, add_special_tokens=False)["input_ids"][:length] for text in texts]
assert all(len(own) == length for own in ids)
base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
config = LoraConfig(r=int(rank), lora_alpha=16, lora_dropout=dropout, target_modules=["qkv_proj", "o_proj"])
network = get_peft_model(base, config)
if checkpointing == "True":
    network.enable_input_require_grads()
    network.gradient_checkpointing_enable()
network.train()
trained = [p for p in network.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=2e-4)
loss = 0.0
for step in range(steps):
    rows = torch.tensor([ids[(step * batch + i) % len(ids)] for i in range(batch)])
    out = network(input_ids=rows, labels=rows)
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss = out.loss.item()
print(json.dumps({"loss": loss}))
'''


def samples(model, text, length, count, folder, python):
    """A file of `count` texts of at least `length` tokens."""
    paragraphs = [line for line in Path(text).read_text().splitlines() if len(line) > 12 * length]
    path = folder / "train.jsonl"
    # No paragraph is long enough for some lengths: neighbours are joined.
    if len(paragraphs) < count:
        words = Path(text).read_text().split()
        size = 2 * length
        paragraphs = [" ".join(words[i * size:(i + 1) * size]) for i in range(count)]
    path.write_text("".join(json.dumps({"text": own}) + "\n" for own in paragraphs[:count]))
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("olive")
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--only-olive", action="store_true")
    args = parser.parse_args()
    python = measure.environment(*PEER)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = samples(args.model, args.text, args.length, args.batch * 8, folder, python)

        def olive(steps, threads):
            output = tempfile.mkdtemp(dir=folder)
            command = [args.olive, "finetune", "-m", args.model, "-o", output, "-d", "json", "--data_files", data,
                       "--text_field", "text", "--max_seq_len", args.length, "--lora_r", args.rank,
                       "--lora_alpha", 16, "--target_modules", "qkv_proj,o_proj",
                       "--per_device_train_batch_size", args.batch, "--gradient_accumulation_steps", 1,
                       "--max_steps", steps, "--logging_steps", steps, "--log_level", 3,
                       "--gradient_checkpointing", args.gradient_checkpointing]
            found = measure.measure(command, threads)
            (folder / "adapter_config.json").write_bytes((Path(output) / "adapter/adapter_config.json").read_bytes())
            log = [json.loads(line) for line in (Path(output) / "train_log.jsonl").read_text().splitlines()]
            expected = steps * args.batch * args.length
            if log[-1]["tokens"] != expected:
                sys.exit(f"olive saw {log[-1]['tokens']} tokens, not {expected}")
            return found

        def peft(steps, threads):
            return measure.measure([python, "-c", TRAIN, args.model, data, folder / "adapter_config.json", args.batch,
                                    args.length, args.rank, steps, threads, args.gradient_checkpointing], threads)

        for threads in args.threads:
            found = {"olive": [], "PEFT": []}
            for _ in range(args.repeats):
                for name, run in [("olive", olive), ("PEFT", peft)]:
                    if args.only_olive and name == "PEFT":
                        continue
                    short, long = run(1, threads), run(1 + args.steps, threads)
                    step = (long.wall - short.wall) / args.steps
                    cpu = (long.cpu - short.cpu) / args.steps
                    found[name].append((step, cpu, long.peak, short.wall - step))
            medians = {name: [measure.median(column) for column in zip(*own)] for name, own in found.items() if own}
            tokens = args.batch * args.length
            for name, (step, cpu, peak, start) in medians.items():
                rows.append([str(threads), name, f"{step * 1000:.0f}", f"{cpu * 1000:.0f}", f"{tokens / step:.0f}",
                             f"{peak:.0f}", f"{start:.2f}"])
            if len(medians) == 2:
                ours, theirs = medians["olive"], medians["PEFT"]
                ratios = [theirs[0] / ours[0], theirs[1] / ours[1], theirs[0] / ours[0], ours[2] / theirs[2],
                          ours[3] / theirs[3]]
                rows.append([str(threads), "**ratio**", *(f"**{own:.2f}**" for own in ratios)])
    title = f"LoRA rank {args.rank} on attention, {args.batch} x {args.length} tokens, float32"
    title += ", gradient checkpointing" if args.gradient_checkpointing else ""
    columns = ["threads", "", "wall ms a step", "CPU ms a step", "tokens/s", "peak MB", "start s (a 1-step run less the step)"]
    measure.table(title, columns, rows)


if __name__ == "__main__":
    main()
