#!/usr/bin/env python3
"""What onnxruntime-genai's own builder makes of the tiny checkpoints, precision by precision and option by option.

    make.py CHECKPOINTS SCRATCH

CHECKPOINTS holds `llama/hf`, `phi3/hf` and `qwen2/hf`; SCRATCH keeps the folders that the builder writes, which are made
only once. Writes `builder.json` beside this script: lines of text that describe inputs, outputs, nodes, initializers (with
the CRC-32 of their bytes) and configs, each once, and for every case the numbers of its lines.

Needs onnxruntime-genai 0.18.0, onnx_ir, torch and transformers. Tables of cosine and sine are listed without a checksum:
the builder makes them with vectorised functions whose last bit depends on the machine. Combinations whose graphs ONNX
Runtime refuses or fails on (fp16 and bf16 on the CPU, fp32 on CUDA and DirectML) are left out.
"""

import json
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

FAMILIES = ["llama", "phi3", "qwen2"]
CASES = {
    "fp16-cuda": ["fp16", "cuda"],
    "bf16-cuda": ["bf16", "cuda"],
    "int4-cuda": ["int4", "cuda"],
    "int8-cpu": ["int8", "cpu"],
    "int8-cuda": ["int8", "cuda"],
    "fp16-dml": ["fp16", "dml"],
    "int4-dml": ["int4", "dml"],
    "int8-dml": ["int8", "dml"],
    "int4-webgpu": ["int4", "webgpu"],
    "fp16-webgpu": ["fp16", "webgpu"],
    "int8-webgpu": ["int8", "webgpu"],
    "fp32-webgpu": ["fp32", "webgpu"],
    "int4-cpu-asym": ["int4", "cpu", "is_symmetric=false"],
    "int4-cpu-rtn": ["int4", "cpu", "algo_config=rtn"],
    "int4-cpu-rtn_last": ["int4", "cpu", "algo_config=rtn_last"],
    "int4-cpu-k_quant": ["int4", "cpu", "algo_config=k_quant"],
    "int4-cpu-k_quant_mixed": ["int4", "cpu", "algo_config=k_quant_mixed"],
    "int4-cpu-k_quant_last": ["int4", "cpu", "algo_config=k_quant_last"],
    "int4-cpu-k_quant_linear": ["int4", "cpu", "algo_config=k_quant_linear"],
    "int4-cpu-qdq": ["int4", "cpu", "use_qdq=true"],
    "int4-cpu-qdq-asym": ["int4", "cpu", "use_qdq=true", "is_symmetric=false"],
    "fp32-cpu-hs": ["fp32", "cpu", "include_hidden_states=true"],
    "fp32-cpu-noembed": ["fp32", "cpu", "exclude_embeds=true"],
    "fp32-cpu-nohead": ["fp32", "cpu", "exclude_lm_head=true"],
    "fp32-cpu-prune": ["fp32", "cpu", "prune_lm_head=true"],
    "fp32-cpu-nofuse": ["fp32", "cpu", "disable_qkv_fusion=true"],
    "fp32-cpu-mlpfuse": ["fp32", "cpu", "fuse_mlp_gate_up=true"],
    "int4-cpu-gather": ["int4", "cpu", "op_types_to_quantize=MatMul/Gather"],
    "int4-cpu-excl": ["int4", "cpu", "nodes_to_exclude=/lm_head/MatMul"],
    "int4-cpu-unshared": ["int4", "cpu", "shared_embeddings=false"],
    "int4-cuda-bf16": ["int4", "cuda", "use_cuda_bf16=true"],
    "int4-cuda-last8": ["int4", "cuda", "matmul_mixed_precision=last_matmul:int8"],
    "int4-webgpu-fp32": ["int4", "webgpu", "use_webgpu_fp32=true"],
    "int8-cpu-asym": ["int8", "cpu", "is_symmetric=false"],
    "int8-cpu-rtn": ["int8", "cpu", "algo_config=rtn"],
    "int8-cpu-k_quant": ["int8", "cpu", "algo_config=k_quant"],
    "fp16-cuda-graph": ["fp16", "cuda", "enable_cuda_graph=true"],
    "fp16-webgpu-graph": ["fp16", "webgpu", "enable_webgpu_graph=true"],
    "int4-cpu-bs128": ["int4", "cpu", "block_size=128"],
}
# What the builder does not finish: tied embeddings cannot be looked up in the QDQ format.
FAILS = {"qwen2.int4-cpu-qdq", "qwen2.int4-cpu-qdq-asym"}


def build(checkpoint, output, arguments):
    precision, provider, *options = arguments
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", checkpoint.parent.name, "-i", str(checkpoint)]
    command += ["-o", str(output), "-p", precision, "-e", provider, "-c", str(output / "cache")]
    if options:
        command += ["--extra_options", *options]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        raise SystemExit(f"{output.name}: {run.stderr[-400:]}")


def shape(dims):
    return "[" + ",".join(str(dim.dim_value) if dim.HasField("dim_value") else dim.dim_param or "?" for dim in dims.dim) + "]"


def is_table(name):
    return name.startswith(("cos_cache", "sin_cache"))


def tensor(value, table):
    label = f"{TensorProto.DataType.Name(value.data_type)}{list(value.dims)}".replace(" ", "")
    return label if table else f"{label}#{zlib.crc32(value.raw_data):08x}"


def attribute(entry, table):
    value = helper.get_attribute_value(entry)
    if isinstance(value, bytes):
        text = value.decode()
    elif isinstance(value, onnx.TensorProto):
        if not value.raw_data:
            value = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(value))
        text = tensor(value, table)
    elif isinstance(value, onnx.GraphProto):
        text = f"{value.name}{{{'; '.join(node(inner) for inner in value.node)}}}"
    elif isinstance(value, float):
        text = f"{np.float32(value).view(np.uint32):08x}"
    else:
        text = str(value).replace(" ", "")
    return f"{entry.name}={text}"


def node(value):
    attributes = sorted(attribute(entry, is_table(value.output[0])) for entry in value.attribute)
    return " ".join([value.op_type, value.domain or "-", value.name, ",".join(value.input), ",".join(value.output), *attributes])


def describe(folder):
    model = onnx.load(str(folder / "model.onnx"))
    graph = model.graph
    values = [f"{info.name} {TensorProto.DataType.Name(info.type.tensor_type.elem_type)} {shape(info.type.tensor_type.shape)}" for info in (*graph.input, *graph.output)]
    initializers = [f"{entry.name} {tensor(entry, is_table(entry.name))}" for entry in graph.initializer]
    config = json.loads((folder / "genai_config.json").read_text())
    return {
        "values": values,
        "nodes": [node(entry) for entry in graph.node],
        "initializers": sorted(initializers),
        "config": [json.dumps(config, sort_keys=True)],
    }


def main():
    checkpoints, scratch = map(Path, sys.argv[1:3])
    numbers, cases = {}, {}
    for family in FAMILIES:
        for name, arguments in CASES.items():
            folder = scratch / f"{family}.{name}"
            if folder.name in FAILS:
                continue
            if not (folder / "genai_config.json").is_file():
                build(checkpoints / family / "hf", folder, arguments)
            described = describe(folder)
            lines = {key: [numbers.setdefault(line, len(numbers)) for line in part] for key, part in described.items()}
            cases[f"{family}.{name}"] = {"arguments": arguments, **lines}
    output = {"lines": list(numbers), "cases": cases}
    text = json.dumps(output, separators=(",", ":")).replace('},"', '},\n"').replace('","', '",\n"')
    Path(__file__).with_name("builder.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
