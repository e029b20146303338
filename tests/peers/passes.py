#!/usr/bin/env python3
"""Runs every ONNX pass on model folders and holds ONNX Runtime's logits after it against those before.

    passes.py APPLY_PASS FOLDER... [--keep OUT]

APPLY_PASS is the example binary `apply_pass` of olive-onnx. Prints a line for each folder and pass: whether the pass
changed the graph, whether a second run did, and the largest differences. Exits with 1 if a pass fails, changes
something the second time, or moves the logits further than its tolerance.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

ERRORS_ONLY = 3
TOKENS = 12
# Relative root mean square error of the logits that each kind of change may make.
EXACT = 1e-6
REORDERED = 2e-5
ROUNDED = 5e-3
INT8_ACTIVATIONS = 0.06
INT8 = 0.08
INT4 = 0.5

NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64, "tensor(int32)": np.int32}


def cases(quantized):
    """Pass, parameters, tolerance; `quantized` models have MatMulNBits already."""
    surgeries = lambda *names, **more: {"surgeries": [{"surgeon": name, **more} for name in names]}
    # MatMulNBits of accuracy level 4 rounds activations to 8 bits, which the dequantized forms do not.
    unpacked = INT8_ACTIVATIONS if quantized else EXACT
    table = [
        ("OnnxPeepholeOptimizer", {}, EXACT),
        ("OnnxFloatToFloat16", {}, 0.05 if quantized else ROUNDED),
        ("OnnxFloatToFloat16", {"keep_io_types": True}, 0.05 if quantized else ROUNDED),
        ("OnnxFloatToFloat16", {"op_block_list": ["SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization"]}, 0.05 if quantized else ROUNDED),
        ("OnnxBlockWiseRtnQuantization", {"block_size": 32}, INT4),
        ("OnnxBlockWiseRtnQuantization", {"block_size": 16, "is_symmetric": False}, INT4),
        ("OnnxBlockWiseRtnQuantization", {"bits": 8, "block_size": 32}, INT8),
        ("OnnxBlockWiseRtnQuantization", {"bits": 8, "block_size": 128, "is_symmetric": False, "accuracy_level": 4}, INT8),
        ("OnnxKQuantQuantization", {}, INT4),
        ("OnnxKQuantQuantization", {"bits": 8}, INT8),
        ("OnnxKQuantQuantization", {"customized_weight_config": {"/lm_head/MatMul": {"bits": 8, "group_size": 64}}}, INT4),
        ("OnnxHqqQuantization", {"block_size": 32}, INT4),
        ("OnnxDynamicQuantization", {}, INT8),
        ("OnnxDynamicQuantization", {"precision": "uint8", "per_channel": True}, INT8),
        ("DynamicToFixedShape", {"dim_param": ["batch_size"], "dim_value": [1]}, EXACT),
        ("AddOliveMetadata", {"graph_name": "renamed", "custom_metadata": {"author": "peers"}}, EXACT),
        ("OnnxIODataTypeConverter", {"source_dtype": 1, "target_dtype": 10}, ROUNDED),
        ("MatMulNBitsToQDQ", {}, unpacked),
        ("MatMulNBitsToQDQ", {"use_signed_int": True, "add_zero_point": True}, unpacked),
        ("MatMulNBitsToQDQ", {"use_transpose_op": True}, unpacked),
        ("GraphSurgeries", surgeries("SimplifiedLayerNormToRMSNorm"), REORDERED if not quantized else INT8_ACTIVATIONS),
        ("GraphSurgeries", surgeries("SimplifiedLayerNormToL2Norm"), 3e-3 if not quantized else INT8_ACTIVATIONS),
        ("GraphSurgeries", surgeries("TieWordEmbeddings"), REORDERED),
        ("GraphSurgeries", surgeries("QuantizeEmbeddingInt8"), INT8),
        ("GraphSurgeries", surgeries("RemoveShapes", "RemoveInitializerFromInputs", "RemoveUnusedNodeOutputs", "RemoveGidxFromMatMulNBits",
                                     "ReplaceAttentionMaskValue", "DeduplicateNodes", "DeduplicateSubgraphInitializers", "ConstantAttributesToTensor"), EXACT),
        ("GraphSurgeries", surgeries("RemoveRopeMultiCache", use_large_cache=False), EXACT),
        ("GraphSurgeries", surgeries("ExposeOutputs", names=["/model/layers.0/input_layernorm/LayerNorm"]), EXACT),
        ("ExtractAdapters", {}, REORDERED),
        ("SplitModel", {"split_assignments": "model.layers.0=0;model.layers.1=1"}, EXACT),
    ]
    return table


def session(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def feed(model, given):
    """Inputs of a session: those that are given, empty caches for the rest."""
    feeds = {}
    for info in model.get_inputs():
        dtype = NUMPY[info.type]
        if info.name in given:
            feeds[info.name] = given[info.name].astype(dtype)
        else:
            shape = [size if isinstance(size, int) else 0 if "past" in size else 1 for size in info.shape]
            shape = [given["head_size"] if size == "kv_cache_dim" else fixed for size, fixed in zip(info.shape, shape)]
            feeds[info.name] = np.zeros(shape, dtype)
    return feeds


def logits(folder, tokens):
    """The logits of a folder's model, or of its parts one after the other."""
    config = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    ids = np.asarray([tokens])
    values = {"input_ids": ids, "attention_mask": np.ones_like(ids), "head_size": config["head_size"]}
    files = [next(iter(stage.values()))["filename"] for stage in config["pipeline"]] if "pipeline" in config else ["model.onnx"]
    for file in files:
        model = session(folder / file)
        names = [output.name for output in model.get_outputs()]
        values.update(zip(names, model.run(names, feed(model, values))))
    return values["logits"].astype(np.float64)


def compare(apply_pass, folder, out, case, before, tokens):
    name, parameters, tolerance = case
    run = subprocess.run([apply_pass, name, json.dumps(parameters), str(folder), str(out)], capture_output=True, text=True)
    if run.returncode != 0:
        return f"failed: {run.stderr.strip()}", False
    _, changed, _, again = run.stdout.split()
    try:
        after = logits(out, tokens)
    except Exception as error:
        return f"ONNX Runtime: {str(error)[:300]}", False
    difference = np.abs(after - before)
    relative = float(np.sqrt((difference**2).sum() / (before**2).sum()))
    good = relative <= tolerance and again != "true" and bool(np.isfinite(after).all())
    text = f"changed {changed:5} again {again:5} max {difference.max():.2e} relative {relative:.2e} (at most {tolerance:g})"
    return text, good


def folder_with(source, target, change):
    """A copy of a model folder whose graph `change` has changed."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and file.name not in ("model.onnx", "model.onnx.data", "adapter_weights.onnx_adapter"):
            (target / file.name).write_bytes(file.read_bytes())
    model = onnx.load(str(source / "model.onnx"))
    change(model.graph)
    onnx.save(model, str(target / "model.onnx"))
    return target


def tie(graph):
    """Lets the head hold the embedding."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    table = onnx.numpy_helper.to_array(constants["model.embed_tokens.weight"])
    head = constants["lm_head.MatMul.weight"]
    head.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(table.T), head.name))


def bake(parameters):
    """Puts an adapter's weights into the graph as constants."""

    def change(graph):
        for entries in (graph.input, graph.initializer):
            kept = [entry for entry in entries if entry.name not in parameters]
            del entries[:]
            entries.extend(kept)
        graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in parameters.items())

    return change


class Chain:
    """Passes one after the other, each held against the one before."""

    def __init__(self, apply_pass, base, tokens):
        self.apply_pass, self.base, self.tokens, self.bad = apply_pass, base, tokens, 0

    def step(self, label, folder, name, parameters, tolerance, smaller=False):
        out = self.base / label
        before = logits(folder, self.tokens)
        text, good = compare(self.apply_pass, folder, out, (name, parameters, tolerance), before, self.tokens)
        good &= text.startswith("changed true")
        if good and smaller:
            sizes = [(path / "model.onnx.data").stat().st_size for path in (folder, out)]
            text += f" {sizes[0]} to {sizes[1]} bytes"
            good &= sizes[1] < sizes[0]
        self.report(good, label, name, text)
        return out

    def report(self, good, label, name, text):
        self.bad += not good
        print(f"{'ok  ' if good else 'BAD '} {label:24} {name:30} {text}", flush=True)


def check_tied(chain, folder, scratch):
    """Embedding and head of one table: tied as floats and as integers, and shared in 8 bits."""
    tied = folder_with(folder, scratch / "tied", tie)
    tying = {"surgeries": [{"surgeon": "TieWordEmbeddings"}]}
    # The copy has its constants inside; written by a pass, they are in a data file.
    tied = chain.step("tied", tied, "AddOliveMetadata", {"graph_name": "tied"}, EXACT)
    chain.step("tied-float", tied, "GraphSurgeries", tying, EXACT, smaller=True)
    for bits in (4, 8):
        packed = chain.step(f"tied-q{bits}", tied, "OnnxBlockWiseRtnQuantization", {"bits": bits, "block_size": 32}, INT4)
        chain.step(f"tied-q{bits}-shared", packed, "GraphSurgeries", tying, EXACT, smaller=True)
    head = {"block_size": 32, "nodes_to_exclude": ["/model/embed_tokens/Gather"]}
    packed = chain.step("tied-head", tied, "OnnxBlockWiseRtnQuantization", head, INT4)
    sharing = {"surgeries": [{"surgeon": "QuantizeEmbeddingInt8"}, {"surgeon": "ShareEmbeddingLmHead"}]}
    chain.step("tied-head-shared", packed, "GraphSurgeries", sharing, INT4, smaller=True)


def check_adapter(chain, folder, base_folder, scratch):
    """Constant LoRA weights: extracted, the graph is the base without the adapter, and what it was with it."""
    adapter = onnxruntime.AdapterFormat.read_adapter(str(folder / "adapter_weights.onnx_adapter"))
    parameters = {name: value.numpy() for name, value in adapter.get_parameters().items()}
    baked = folder_with(folder, scratch / "baked", bake(parameters))
    base = logits(base_folder, chain.tokens)
    packed = chain.step("baked-q4", baked, "OnnxBlockWiseRtnQuantization", {"block_size": 32}, INT4)
    for label, source, tolerance in (("baked", baked, EXACT), ("baked-q4", packed, EXACT)):
        out = chain.base / f"{label}-extracted"
        subprocess.run([chain.apply_pass, "ExtractAdapters", "{}", str(source), str(out)], check=True, capture_output=True)
        model = session(out / "model.onnx")
        config = json.loads((out / "genai_config.json").read_text())["model"]["decoder"]
        ids = np.asarray([chain.tokens])
        given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "head_size": config["head_size"]}
        lora = onnxruntime.LoraAdapter()
        lora.Load(str(out / "adapter_weights.onnx_adapter"))
        options = onnxruntime.RunOptions()
        options.add_active_adapter(lora)
        active = model.run(["logits"], feed(model, given), options)[0].astype(np.float64)
        reference = logits(source, chain.tokens)
        relative = float(np.sqrt(((active - reference) ** 2).sum() / (reference**2).sum()))
        inactive = float(np.abs(logits(out, chain.tokens) - base).max()) if label == "baked" else 0.0
        chain.report(relative <= tolerance and inactive == 0.0, label, "ExtractAdapters", f"active {relative:.2e} inactive {inactive:.2e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("apply_pass")
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--keep", type=Path, help="where the folders that passes write are kept")
    arguments = parser.parse_args()
    scratch = tempfile.TemporaryDirectory()
    base = arguments.keep or Path(scratch.name)
    bad = 0
    for folder in arguments.folders:
        vocabulary = json.loads((folder / "genai_config.json").read_text())["model"]["vocab_size"]
        tokens = [(7 * i * i + 13 * i + 5) % (vocabulary - 32) for i in range(TOKENS)]
        before = logits(folder, tokens)
        label = f"{folder.parent.name}/{folder.name}"
        quantized = any(node.op_type == "MatMulNBits" for node in onnx.load(str(folder / "model.onnx"), load_external_data=False).graph.node)
        for index, case in enumerate(cases(quantized)):
            out = base / label.replace("/", "-") / f"{index:02}-{case[0]}"
            text, good = compare(arguments.apply_pass, folder, out, case, before, tokens)
            bad += not good
            shown = json.dumps(case[1])
            print(f"{'ok  ' if good else 'BAD '} {label:24} {case[0]:30} {text}  {shown[:90]}", flush=True)
        chain = Chain(arguments.apply_pass, base / f"{label.replace('/', '-')}-chains", tokens)
        names = {tensor.name for tensor in onnx.load(str(folder / "model.onnx"), load_external_data=False).graph.initializer}
        if {"model.embed_tokens.weight", "lm_head.MatMul.weight"} <= names and not (folder / "adapter_weights.onnx_adapter").exists():
            check_tied(chain, folder, Path(scratch.name) / label)
        base_folder = folder.with_name(folder.name.removesuffix("-adapters"))
        if (folder / "adapter_weights.onnx_adapter").exists() and base_folder != folder and base_folder.exists():
            check_adapter(chain, folder, base_folder, Path(scratch.name) / label)
        bad += chain.bad
    print(f"{bad} bad")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
