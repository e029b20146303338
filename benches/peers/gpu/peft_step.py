"""Times training steps of PEFT on one GPU: a random model of Phi-3.5-mini's shape in bfloat16.

    python peft_step.py [--compile] [--checkpointing] --batch 4 --length 512 [--r 64] [--steps 17]

Prints one JSON object: milliseconds of a step (minimum and median), the largest memory that torch allocated, and what the process holds
of the device (nvidia-smi's count).
"""

import argparse
import json
import statistics
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import Phi3Config, Phi3ForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--length", type=int, default=512)
parser.add_argument("--r", type=int, default=64)
parser.add_argument("--dropout", type=float, default=0.0)
parser.add_argument("--warm_up", type=int, default=8)
parser.add_argument("--steps", type=int, default=17)
parser.add_argument("--compile", action="store_true")
parser.add_argument("--checkpointing", action="store_true")
args = parser.parse_args()

torch.manual_seed(0)
config = Phi3Config(
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    vocab_size=32064,
    max_position_embeddings=4096,
    attn_implementation="sdpa",
    use_cache=False,
)
torch.set_default_dtype(torch.bfloat16)
with torch.device("cuda"):
    model = Phi3ForCausalLM(config)
torch.set_default_dtype(torch.float32)
lora = LoraConfig(
    r=args.r,
    lora_alpha=16,
    lora_dropout=args.dropout,
    target_modules=["qkv_proj", "o_proj"],
    task_type="CAUSAL_LM",
)
model = get_peft_model(model, lora)
if args.checkpointing:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
model.train()
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
forward = torch.compile(model) if args.compile else model
ids = torch.randint(0, 32064, (args.batch, args.length), device="cuda")


def step():
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = forward(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss


for _ in range(args.warm_up):
    loss = step()
torch.cuda.synchronize()
torch.cuda.reset_peak_memory_stats()
times = []
for _ in range(args.steps):
    start = time.perf_counter()
    loss = step()
    torch.cuda.synchronize()
    times.append(1e3 * (time.perf_counter() - start))
free, total = torch.cuda.mem_get_info()
print(
    json.dumps(
        {
            "what": f"PEFT {args.batch}x{args.length} r{args.r} dropout {args.dropout}"
            + (" compiled" if args.compile else "")
            + (" checkpointing" if args.checkpointing else ""),
            "min_ms": round(min(times), 2),
            "median_ms": round(statistics.median(times), 2),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
            "used_gib": round((total - free) / 2**30, 2),
            "loss": float(loss.detach()),
        }
    )
)
