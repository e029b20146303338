#!/usr/bin/env python3
"""Builds every kind of graph, runs every ONNX pass, and holds ONNX Runtime's logits after it against those before.

    passes.py EXAMPLES [FOLDER...] [--keep OUT] [--only builds|passes]

EXAMPLES is the folder with olive-onnx's example binaries `build_folder` and `apply_pass` (`target/release/examples`).
Without a FOLDER the model folders are built from the checkpoints in the repository; it needs nothing else. Prints a line
for each graph: how far its logits are from those of the fp32 graph, in one run and step by step; then for each folder and
pass: whether the pass changed the graph, whether a second run did, and the largest differences. Exits with 1 if something
fails, a pass changes something the second time, or the logits move further than the tolerance.
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

ROOT = Path(__file__).resolve().parents[2]
# The demo model, and a family each with tied embeddings and biases, norms on heads, and heads that are rotated in part.
CHECKPOINTS = [ROOT / "fixtures/tiny-phi3", *(ROOT / "tests/golden/families" / name for name in ("qwen2", "qwen3", "phi3-partial"))]
# What is built of each: precision, provider, options, tolerance against the fp32 graph for the CPU.
BUILDS = [
    ("fp16", "cpu", [], ROUNDED),
    ("fp16", "dml", [], ROUNDED),
    ("fp32", "dml", [], REORDERED),
    ("fp32", "cuda", ["fuse_qk_norm_gqa=false"], REORDERED),
    ("fp16", "webgpu", ["fuse_qk_norm_gqa=false", "enable_webgpu_graph=true"], ROUNDED),
    ("bf16", "cuda", [], None),
    ("bf16", "cpu", [], None),
    ("int8", "cpu", [], INT8),
    ("int8", "cpu", ["is_symmetric=false"], INT8),
    ("int8", "cpu", ["algo_config=k_quant"], INT8),
    ("int8", "dml", [], INT8),
    ("int4", "cpu", ["block_size=16"], INT4),
    ("int4", "cpu", ["block_size=16", "is_symmetric=false"], INT4),
    ("int4", "cpu", ["block_size=16", "algo_config=rtn"], INT4),
    ("int4", "cpu", ["block_size=16", "algo_config=k_quant_mixed"], INT4),
    ("int4", "cpu", ["block_size=16", "use_qdq=true"], INT4),
    ("int4", "cpu", ["block_size=16", "use_qdq=true", "is_symmetric=false"], INT4),
    ("int4", "cpu", ["block_size=16", "op_types_to_quantize=MatMul/Gather", "shared_embeddings=false"], INT4),
    ("int4", "cpu", ["block_size=16", "op_types_to_quantize=MatMul/Gather", "shared_embeddings=false", "is_symmetric=false"], INT4),
    ("int4", "cpu", ["block_size=16", "nodes_to_exclude=/lm_head/MatMul"], INT4),
    ("int4", "cuda", ["block_size=16", "fuse_qk_norm_gqa=false"], INT4),
    ("fp32", "cpu", ["fuse_qkv=false", "fuse_mlp_gate_up=true"], REORDERED),
    ("fp32", "cpu", ["include_hidden_states=true"], REORDERED),
    ("fp32", "cpu", ["exclude_embeds=true"], REORDERED),
    ("fp32", "cpu", ["exclude_lm_head=true"], REORDERED),
    ("fp32", "cpu", ["prune_lm_head=true"], REORDERED),
    ("fp32", "cpu", ["shared_embeddings=false"], REORDERED),
]
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
        # Without ε: what it is added to is small in the demo model.
        ("GraphSurgeries", surgeries("SimplifiedLayerNormToL2Norm"), 1e-2 if not quantized else INT8_ACTIVATIONS),
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


def run(model, tokens, outputs, cache=None, start=0, table=None):
    """One call of a session: the wanted outputs, and the cache that it leaves."""
    ids = np.asarray([tokens])
    total = start + len(tokens)
    given = {
        "input_ids": ids,
        "attention_mask": np.ones((1, total), np.int64),
        "position_ids": np.arange(start, total)[None],
    }
    if table is not None:
        given["inputs_embeds"] = table[ids]
    feeds = {}
    for info in model.get_inputs():
        dtype = NUMPY[info.type]
        if info.name in given:
            feeds[info.name] = given[info.name].astype(dtype)
        elif cache:
            feeds[info.name] = cache[info.name]
        else:
            feeds[info.name] = np.zeros((1, info.shape[1], 0, model.head_size), dtype)
    names = [output.name for output in model.get_outputs()]
    values = dict(zip(names, model.run(names, feeds)))
    cache = {name.replace("present", "past_key_values"): value for name, value in values.items() if name.startswith("present")}
    return [values[name].astype(np.float64) for name in outputs], cache


def relative_error(value, reference):
    return float(np.sqrt(((value - reference) ** 2).sum() / (reference**2).sum()))


class Builds:
    """Graphs of one checkpoint against its fp32 graph."""

    def __init__(self, build_folder, checkpoint, base):
        self.build_folder, self.checkpoint, self.base, self.bad = build_folder, checkpoint, base, 0
        config = json.loads((checkpoint / "config.json").read_text())
        self.tokens = [(7 * i * i + 13 * i + 5) % (config["vocab_size"] - 32) for i in range(TOKENS)]
        folder = self.build("reference", "fp32", "cpu", ["include_hidden_states=true", "shared_embeddings=false"])
        constants = {tensor.name: tensor for tensor in onnx.load(str(folder / "model.onnx")).graph.initializer}
        self.table = onnx.numpy_helper.to_array(constants["model.embed_tokens.weight"])
        (self.logits, self.hidden), _ = run(self.open(folder), self.tokens, ["logits", "hidden_states"])

    def build(self, label, precision, provider, options):
        folder = self.base / label
        command = [self.build_folder, str(self.checkpoint), str(folder), precision, provider, *options]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(done.stderr.strip()[-300:])
        return folder

    def open(self, folder):
        model = session(folder / "model.onnx")
        model.head_size = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]["head_size"]
        return model

    def check(self, number, precision, provider, options, tolerance):
        label = " ".join([precision, provider, *options])
        try:
            folder = self.build(f"{number:02}", precision, provider, options)
            text, good = self.judge(folder, options, tolerance)
        except Exception as error:
            text, good = str(error)[:300], False
        self.bad += not good
        print(f"{'ok  ' if good else 'BAD '} {self.checkpoint.name:14} {text}  {label}", flush=True)

    def judge(self, folder, options, tolerance):
        path = str(folder / "model.onnx")
        model = onnx.load(path, load_external_data=False)
        kinds = {node.op_type for node in model.graph.node}
        onnx.shape_inference.infer_shapes(model, strict_mode=not kinds & {"GroupQueryAttention"})
        if tolerance is None:
            return self.judge_bf16(path)
        session_ = self.open(folder)
        headless = "exclude_lm_head=true" in options
        reference = self.hidden if headless else self.logits
        if "prune_lm_head=true" in options:
            reference = reference[:, -1:]
        wanted = ["hidden_states" if headless else "logits"]
        (whole,), _ = run(session_, self.tokens, wanted, table=self.table)
        # The same in three calls, the last two of one token.
        _, cache = run(session_, self.tokens[:-2], wanted, table=self.table)
        (_,), cache = run(session_, self.tokens[-2:-1], wanted, cache, TOKENS - 2, self.table)
        (step,), _ = run(session_, self.tokens[-1:], wanted, cache, TOKENS - 1, self.table)
        distance, stepped = relative_error(whole, reference), relative_error(step, whole[:, -1:])
        limit = max(tolerance if tolerance <= ROUNDED else INT8_ACTIVATIONS, ROUNDED)
        good = whole.shape == reference.shape and distance <= tolerance and stepped <= limit
        return f"relative {distance:.2e} (at most {tolerance:g}) stepwise {stepped:.2e}", good


    def judge_bf16(self, path):
        """ONNX Runtime's CPU has no kernels for bf16 products: the types are checked, and the fp32 model's numbers in them."""
        graph = onnx.load(path).graph
        output = {value.name: value.type.tensor_type.elem_type for value in graph.output}
        good = output["present.0.key"] == onnx.TensorProto.BFLOAT16 and output["logits"] == onnx.TensorProto.FLOAT
        reference = self.build("fp32", "fp32", "cpu", [])
        exact = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(str(reference / "model.onnx")).graph.initializer}
        worst, count = 0.0, 0
        for tensor in graph.initializer:
            if tensor.data_type == onnx.TensorProto.BFLOAT16:
                bits = np.frombuffer(tensor.raw_data, np.uint16).astype(np.uint32) << 16
                value, wanted = bits.view(np.float32).reshape(tensor.dims), exact[tensor.name]
                worst = max(worst, float((np.abs(value - wanted) - 2.0**-8 * np.abs(wanted)).max()))
                count += 1
        return f"{count} bf16 constants, the graph checked, not run", good and count > 8 and worst <= 0.0


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


def check_builds(build_folder, base):
    bad = 0
    for checkpoint in CHECKPOINTS:
        builds = Builds(build_folder, checkpoint, base / checkpoint.name)
        for number, case in enumerate(BUILDS):
            builds.check(number, *case)
        bad += builds.bad
    return bad


def own_folders(build_folder, base):
    """The demo model as fp32 and int4 graphs."""
    folders = []
    for precision in ("fp32", "int4"):
        folder = base / "tiny-phi3" / precision
        subprocess.run([build_folder, str(CHECKPOINTS[0]), str(folder), precision], check=True, capture_output=True)
        folders.append(folder)
    return folders


def check_passes(apply_pass, folder, base, scratch):
    bad = 0
    vocabulary = json.loads((folder / "genai_config.json").read_text())["model"]["vocab_size"]
    tokens = [(7 * i * i + 13 * i + 5) % (vocabulary - 32) for i in range(TOKENS)]
    before = logits(folder, tokens)
    label = f"{folder.parent.name}/{folder.name}"
    graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
    quantized = any(node.op_type == "MatMulNBits" for node in graph.node)
    for index, case in enumerate(cases(quantized)):
        out = base / label.replace("/", "-") / f"{index:02}-{case[0]}"
        text, good = compare(apply_pass, folder, out, case, before, tokens)
        bad += not good
        shown = json.dumps(case[1])
        print(f"{'ok  ' if good else 'BAD '} {label:24} {case[0]:30} {text}  {shown[:90]}", flush=True)
    chain = Chain(apply_pass, base / f"{label.replace('/', '-')}-chains", tokens)
    names = {tensor.name for tensor in graph.initializer}
    if {"model.embed_tokens.weight", "lm_head.MatMul.weight"} <= names and not (folder / "adapter_weights.onnx_adapter").exists():
        check_tied(chain, folder, scratch / label)
    base_folder = folder.with_name(folder.name.removesuffix("-adapters"))
    if (folder / "adapter_weights.onnx_adapter").exists() and base_folder != folder and base_folder.exists():
        check_adapter(chain, folder, base_folder, scratch / label)
    return bad + chain.bad


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("examples", type=Path)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--keep", type=Path, help="where the folders that passes write are kept")
    parser.add_argument("--only", choices=["builds", "passes"])
    arguments = parser.parse_args()
    scratch = tempfile.TemporaryDirectory()
    base = arguments.keep or Path(scratch.name) / "out"
    apply_pass, build_folder = (str(arguments.examples / name) for name in ("apply_pass", "build_folder"))
    bad = 0
    if arguments.only != "passes" and not arguments.folders:
        bad += check_builds(build_folder, base / "builds")
    if arguments.only != "builds":
        folders = arguments.folders or own_folders(build_folder, Path(scratch.name) / "built")
        for folder in folders:
            bad += check_passes(apply_pass, folder, base, Path(scratch.name))
    print(f"{bad} bad")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
