"""Records what bitsandbytes makes of a few weights on the CPU.

    pip install torch bitsandbytes safetensors && python generate.py

Recorded with bitsandbytes 0.50.2 and torch 2.15.0. quantized.safetensors holds for each case `<case>.dense`, and for each of nf4, fp4 and plain, double the tensors that
transformers would store for the module `<case>.<type>.<plain|double>`, and `….dequantized`.
"""

from pathlib import Path

import bitsandbytes.functional as F
import torch
from safetensors.torch import save_file

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(5)


def edges():
    """Every value of both maps, what lies halfway, its neighbours, zeros and a block of zeros."""
    values = []
    for kind in ("nf4", "fp4"):
        code = F.get_4bit_type(kind, device="cpu").sort().values
        middles = (code[1:] + code[:-1]) / 2
        up, down = (torch.nextafter(middles, torch.full_like(middles, to)) for to in (2.0, -2.0))
        values += [code, middles, up, down]
    row = torch.cat(values)
    block = torch.zeros(192)
    block[: len(row)] = row
    block[64 - 1 :: 64] = 1.0
    # Rows of whole blocks: in longer rows that end within a block the CPU path gives back values of another block.
    return torch.cat([block, torch.zeros(64), block * 0.37, -block * 1e-3]).reshape(-1, 64).contiguous()


cases = {
    "normal": torch.randn(96, 256, generator=generator) * torch.rand(96, 1, generator=generator),
    "edges": edges(),
    "ragged": torch.randn(5, 30, generator=generator),
    "half": torch.randn(16, 64, generator=generator).to(torch.bfloat16),
}

tensors = {}
for case, dense in cases.items():
    tensors[f"{case}.dense"] = dense.contiguous()
    for kind in ("nf4", "fp4"):
        for double in (False, True):
            module = f"{case}.{kind}.{'double' if double else 'plain'}"
            packed, state = F.quantize_4bit(dense, quant_type=kind, compress_statistics=double)
            tensors[f"{module}.weight"] = packed
            for name, part in state.as_dict(packed=True).items():
                tensors[f"{module}.weight.{name}"] = part.clone().contiguous()
            back = F.dequantize_4bit(packed, state)
            tensors[f"{module}.dequantized"] = back.reshape(dense.shape).contiguous()
save_file(tensors, Path(__file__).resolve().parent / "quantized.safetensors")
