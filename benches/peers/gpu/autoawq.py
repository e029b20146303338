"""Times AutoAWQ 0.2.9 on one GPU, from reading a checkpoint to the written folder.

    python autoawq.py CHECKPOINT [--samples 128] [--length 512]

Needs autoawq==0.2.9 (its pure Python source is enough), transformers==4.51.3 and torch. The calibration is random tokens: the time
does not depend on them. Prints one JSON object: seconds of reading, quantizing and writing, and the largest memory that torch allocated.
"""

import argparse
import json
import random
import tempfile
import time

import torch
from awq import AutoAWQForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("checkpoint")
parser.add_argument("--samples", type=int, default=128)
parser.add_argument("--length", type=int, default=512)
args = parser.parse_args()

random.seed(0)
began = time.perf_counter()
model = AutoAWQForCausalLM.from_pretrained(args.checkpoint, torch_dtype=torch.bfloat16, use_cache=False)
vocabulary = model.config.vocab_size
tokens = [[random.randrange(vocabulary) for _ in range(args.length)] for _ in range(args.samples)]
read = time.perf_counter()
model.quantize(
    None,
    quant_config={"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"},
    calib_data=tokens,
    max_calib_samples=args.samples,
    max_calib_seq_len=args.length,
)
quantized = time.perf_counter()
with tempfile.TemporaryDirectory() as folder:
    model.save_quantized(folder)
    written = time.perf_counter()
print(json.dumps({
    "what": f"AutoAWQ {args.samples}x{args.length}",
    "read_s": round(read - began, 1),
    "quantize_s": round(quantized - read, 1),
    "write_s": round(written - quantized, 1),
    "whole_s": round(written - began, 1),
    "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
}))
