#!/usr/bin/env python3
"""Holds what olive writes and generates against the real packages: onnx, onnxruntime, onnxruntime-genai, and PEFT's format.

    check.py generate FOLDER --prompt-ids 1,2,3 [--adapter name=file] --max-new-tokens N
    check.py compare  FOLDER OLIVE [--adapter FILE] [--prompts FILE]
    check.py onnx     FOLDER
    check.py adapter  FILE [--folder FOLDER]
    check.py logits   FOLDER --ids 1,2,3 --out FILE.npy [--adapter FILE]
    check.py peft     ADAPTER_FOLDER [--base FOLDER]

Every command prints what it found on stdout. It exits with 1 and one line that says what is wrong when something is.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

# ORT tells every overridable initializer as a warning; only errors matter here.
LOG_ERRORS_ONLY = 3

PROMPTS = [
    "What is the best time to visit Chicago?",
    "<|user|>\nTell me about the weather in Paris<|end|>\n<|assistant|>\n",
    "It was a bright cold day in April, and the clocks",
    "Matkustus: Zürich → 東京, 3 päivää",
    "The road went on through the hills and down to the sea, and along it came, one after the other, the carts of the "
    "farmers, the coach of the post, and a boy with a dog. Nobody spoke. The boy counted the carts as they passed him, "
    "one, two, three, and when he had come to twenty he stopped, for he did not know what comes after twenty. "
    "The farmers were on their way to the market, where they would sell apples and buy salt; the coach was late, as it was "
    "on most days; and the dog had seen a hare. So everybody on the road had somewhere to be, and",
]


class Mismatch(Exception):
    """Something is not as it should be; the message is for the person who reads the log."""


def require(condition, message):
    if not condition:
        raise Mismatch(message)


def number_list(text):
    try:
        numbers = [int(part) for part in text.replace(" ", "").split(",") if part]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 1,2,3")
    if not numbers:
        raise argparse.ArgumentTypeError("the list of ids is empty")
    return numbers


def named_file(text):
    name, separator, path = text.partition("=")
    if not separator or not name or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=file")
    return name, path


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise Mismatch(f"{path}: {error.strerror}")
    except json.JSONDecodeError as error:
        raise Mismatch(f"{path} is not JSON: {error}")


# ------------------------------------------------------------------------------------------------- onnxruntime-genai


class Reference:
    """One model folder, opened by onnxruntime-genai on the CPU."""

    def __init__(self, folder, adapter=None):
        import onnxruntime_genai

        self.og = onnxruntime_genai
        config = self.og.Config(str(folder))
        quiet = {"model": {"decoder": {"session_options": {"log_severity_level": LOG_ERRORS_ONLY}}}}
        config.overlay(json.dumps(quiet))
        self.model = self.og.Model(config)
        described = read_json(Path(folder) / "genai_config.json")["model"]
        self.context = described["context_length"]
        stops = described["eos_token_id"]
        self.stops = set(stops if isinstance(stops, list) else [stops])
        self.adapters = None
        if adapter:
            self.adapter_name, path = adapter
            self.adapters = self.og.Adapters(self.model)
            self.adapters.load(str(path), self.adapter_name)

    def greedy(self, prompt, max_new_tokens, with_adapter=True):
        """New tokens without the stop token that ends them, and how far the chosen one was ahead at each step."""
        length = min(len(prompt) + max_new_tokens, self.context)
        require(length > len(prompt), f"the prompt of {len(prompt)} tokens fills the context of {self.context}")
        params = self.og.GeneratorParams(self.model)
        params.set_search_options(do_sample=False, max_length=length, batch_size=1, num_beams=1)
        generator = self.og.Generator(self.model, params)
        if self.adapters is not None and with_adapter:
            generator.set_active_adapter(self.adapters, self.adapter_name)
        generator.append_tokens(prompt)
        tokens, margins = [], []
        while not generator.is_done():
            logits = np.asarray(generator.get_logits()).reshape(-1)
            second, first = np.partition(logits, -2)[-2:]
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
            margins.append(float(first - second))
        if tokens and tokens[-1] in self.stops:
            tokens.pop()
        return tokens, margins

    def encode(self, text):
        return [int(token) for token in self.og.Tokenizer(self.model).encode(text)]


def generate(arguments):
    reference = Reference(arguments.folder, arguments.adapter)
    tokens, _ = reference.greedy(arguments.prompt_ids, arguments.max_new_tokens)
    print(json.dumps({"output_ids": tokens}))


# ------------------------------------------------------------------------------------------- olive against the reference


def ask_olive(arguments, prompt, adapter):
    command = [arguments.olive, "generate", "-m", str(arguments.folder), "--prompt", prompt]
    command += ["--max_new_tokens", str(arguments.max_new_tokens), "--json", *arguments.olive_arg]
    if adapter:
        command += ["--adapter", f"{adapter[0]}={adapter[1]}"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    shown = " ".join(command[:4])
    require(done.returncode == 0, f"`{shown} …` ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    try:
        answer = json.loads(done.stdout)
    except json.JSONDecodeError as error:
        raise Mismatch(f"`{shown} … --json` did not print one JSON object: {error}; it printed {done.stdout[:500]!r}")
    for key in ("prompt_ids", "output_ids", "text", "finish_reason"):
        require(key in answer, f"`{shown} … --json` has no {key!r}")
    return answer


def compare_one(arguments, reference, prompt, adapter):
    answer = ask_olive(arguments, prompt, adapter)
    ours = answer["output_ids"]
    expected, margins = reference.greedy(answer["prompt_ids"], arguments.max_new_tokens, with_adapter=adapter is not None)
    answer["parts_at"] = None
    if ours != expected:
        same = len(os.path.commonprefix([ours, expected]))
        if same < min(len(margins), len(ours)) and margins[same] < arguments.near_tie:
            answer["parts_at"] = same
            return answer
        ahead = f"{margins[same]:.2e}" if same < len(margins) else "nothing"
        raise Mismatch(
            f"prompt {prompt[:60]!r}, {'with' if adapter else 'without'} adapter: the tokens differ at step {same} "
            f"(there the reference's choice was ahead by {ahead})\n  olive:     {ours}\n  reference: {expected}"
        )
    return answer


def compare(arguments):
    prompts = PROMPTS
    if arguments.prompts:
        lines = Path(arguments.prompts).read_text(encoding="utf-8").splitlines()
        prompts = [line.replace("\\n", "\n") for line in lines if line.strip()]
    require(prompts, "there is no prompt to compare")
    adapter = ("check", arguments.adapter) if arguments.adapter else None
    if adapter:
        require(Path(arguments.adapter).is_file(), f"{arguments.adapter}: no such file")
    reference = Reference(arguments.folder, adapter)
    # Greedy decoding is asked for only where the folder's own default is to sample.
    search = read_json(Path(arguments.folder) / "genai_config.json").get("search", {})
    if search.get("do_sample") and not arguments.olive_arg:
        arguments.olive_arg = ["--do_sample", "false"]

    changed = parted = 0
    for prompt in prompts:
        base = compare_one(arguments, reference, prompt, None)
        words = f"{len(base['prompt_ids'])} prompt ids, {len(base['output_ids'])} new ({base['finish_reason']})"
        if reference.encode(prompt) != base["prompt_ids"]:
            words += ", tokenized unlike onnxruntime-extensions"
        if base["parts_at"] is not None:
            parted += 1
            words += f", parts at step {base['parts_at']} where two scores are nearly equal"
        if adapter:
            adapted = compare_one(arguments, reference, prompt, adapter)
            require(adapted["prompt_ids"] == base["prompt_ids"], "the adapter changes how the prompt is tokenized")
            different = adapted["output_ids"] != base["output_ids"]
            changed += different
            words += f"; adapter: {len(adapted['output_ids'])} new, {'another answer' if different else 'same answer'}"
        print(f"equal: {prompt[:40]!r}: {words}")
    if adapter:
        require(changed, f"the adapter changes none of the {len(prompts)} answers, so it is not active or has no effect")
    require(parted * 2 < len(prompts), f"{parted} of {len(prompts)} answers part from the reference's, even if at near ties")
    print(f"{len(prompts) - parted} prompts equal to onnxruntime-genai{f', {changed} changed by the adapter' if adapter else ''}")


# --------------------------------------------------------------------------------------------------- model.onnx on disk


def register_contrib_norm(onnx):
    """SimplifiedLayerNormalization lives in the default domain for historical reasons, and onnx does not know it.

    onnxruntime-genai's own builder writes it there. With its schema the checker can judge everything else.
    """
    schema = onnx.defs.OpSchema
    floats = [f"tensor({kind})" for kind in ("float16", "float", "double", "bfloat16")]
    onnx.defs.register_schema(
        schema(
            "SimplifiedLayerNormalization",
            "",
            1,
            inputs=[schema.FormalParameter("X", "T"), schema.FormalParameter("scale", "V")],
            outputs=[
                schema.FormalParameter("Y", "V"),
                schema.FormalParameter("inv_std_var", "U", param_option=schema.FormalParameterOption.Optional),
            ],
            type_constraints=[("T", floats, ""), ("U", ["tensor(float)", "tensor(double)"], ""), ("V", floats, "")],
            attributes=[
                schema.Attribute("axis", schema.AttrType.INT, ""),
                schema.Attribute("epsilon", schema.AttrType.FLOAT, ""),
                schema.Attribute("stash_type", schema.AttrType.INT, ""),
            ],
        )
    )


def tensor_bytes(onnx, tensor):
    kind = tensor.data_type
    count = math.prod(tensor.dims)
    if kind in (onnx.TensorProto.UINT4, onnx.TensorProto.INT4):
        return (count + 1) // 2
    return count * onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize


def walk_tensors(onnx, graph):
    """All tensors of a graph: initializers, tensors in attributes, and those of the graphs inside."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield attribute.t
            for inner in ([attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs):
                yield from walk_tensors(onnx, inner)


def check_external_data(onnx, model, folder):
    """Every external tensor is inside a file of the folder, has the length of its shape, and shares no byte."""
    ranges = {}
    for tensor in walk_tensors(onnx, model.graph):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        fields = {entry.key: entry.value for entry in tensor.external_data}
        location = fields.get("location", "")
        path = Path(location)
        require(location and not path.is_absolute() and ".." not in path.parts, f"{tensor.name}: bad location {location!r}")
        require((folder / path).is_file(), f"{tensor.name}: there is no file {location}")
        offset = int(fields.get("offset", 0))
        expected = tensor_bytes(onnx, tensor)
        length = int(fields.get("length", expected))
        size = (folder / path).stat().st_size
        require(length == expected, f"{tensor.name}: {length} bytes are stored, its shape {list(tensor.dims)} needs {expected}")
        require(0 <= offset <= size - length, f"{tensor.name}: bytes {offset}..{offset + length} are outside {location} ({size})")
        ranges.setdefault(location, []).append((offset, offset + length, tensor.name))
    for location, taken in ranges.items():
        taken.sort()
        for (_, end, first), (start, _, second) in zip(taken, taken[1:]):
            require(start >= end, f"{first} and {second} share bytes of {location}")
    return sum(len(taken) for taken in ranges.values())


def open_session(path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = LOG_ERRORS_ONLY
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def check_onnx(arguments):
    import onnx

    folder = Path(arguments.folder)
    path = folder / "model.onnx"
    require(path.is_file(), f"{path}: no such file")
    register_contrib_norm(onnx)
    model = onnx.load(path, load_external_data=False)
    external = check_external_data(onnx, model, folder)
    try:
        onnx.checker.check_model(str(path), full_check=not arguments.basic)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise Mismatch(f"onnx.checker refuses {path}: {error}")
    domains = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    session = open_session(path)
    print(f"{path}: {len(model.graph.node)} nodes, {external} external tensors, opsets {domains}, checked, loads in onnxruntime")

    if (folder / "genai_config.json").is_file():
        decoder = read_json(folder / "genai_config.json")["model"]["decoder"]
        names = {value.name for value in session.get_inputs()} | {value.name for value in session.get_outputs()}
        for name in [*decoder["inputs"].values(), *decoder["outputs"].values()]:
            for layer in range(decoder["num_hidden_layers"] if "%d" in name else 1):
                actual = name.replace("%d", str(layer))
                require(actual in names, f"genai_config.json names {actual}, which the graph does not have")
        reference = Reference(folder)
        tokens, _ = reference.greedy([1, 2, 3], 2)
        print(f"{folder}: onnxruntime-genai opens it and generates {len(tokens)} tokens")


# ---------------------------------------------------------------------------------------------------------- adapters


def read_onnx_adapter(path):
    import onnxruntime

    require(Path(path).is_file(), f"{path}: no such file")
    try:
        adapter = onnxruntime.AdapterFormat.read_adapter(str(path))
    except Exception as error:  # onnxruntime raises its own, undocumented types here
        raise Mismatch(f"onnxruntime refuses {path}: {error}")
    return adapter, adapter.get_parameters()


def check_adapter(arguments):
    adapter, parameters = read_onnx_adapter(arguments.file)
    require(parameters, f"{arguments.file} holds no tensor")
    described = {name: {"shape": value.shape(), "type": value.data_type()} for name, value in sorted(parameters.items())}
    for name, value in parameters.items():
        require(np.isfinite(value.numpy()).all(), f"{name} holds a value that is not finite")
    print(
        json.dumps(
            {
                "format_version": adapter.get_format_version(),
                "adapter_version": adapter.get_adapter_version(),
                "model_version": adapter.get_model_version(),
                "parameters": described,
            },
            indent=1,
        )
    )
    if not arguments.folder:
        return
    session = open_session(Path(arguments.folder) / "model.onnx")
    open_inputs = {value.name: value for value in session.get_overridable_initializers()}
    open_inputs |= {value.name: value for value in session.get_inputs()}
    for name, described_as in described.items():
        require(name in open_inputs, f"the graph has no input {name}")
        wanted, shape = open_inputs[name], described_as["shape"]
        require(wanted.type == described_as["type"], f"{name} is {described_as['type']}, the graph wants {wanted.type}")
        # A dimension without a number, or of size zero, is the rank: any will do.
        fits = len(shape) == len(wanted.shape) and all(
            not isinstance(want, int) or want == 0 or want == have for have, want in zip(shape, wanted.shape)
        )
        require(fits, f"{name} has shape {shape}, the graph wants {wanted.shape}")
    missing = sorted(value.name for value in session.get_overridable_initializers() if value.name not in described)
    require(not missing, f"the adapter leaves {len(missing)} of the graph's adapter inputs open, first {missing[:1]}")


def first_logits(arguments):
    import onnxruntime

    folder = Path(arguments.folder)
    decoder = read_json(folder / "genai_config.json")["model"]["decoder"]
    session = open_session(folder / decoder["filename"])
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    count = len(arguments.ids)
    feeds = {}
    for value in session.get_inputs():
        if value.name == decoder["inputs"]["input_ids"]:
            feeds[value.name] = np.array([arguments.ids], dtype=np.int64)
        elif value.name == decoder["inputs"]["attention_mask"]:
            feeds[value.name] = np.ones((1, count), dtype=np.int64)
        elif value.name == decoder["inputs"].get("position_ids", "position_ids"):
            feeds[value.name] = np.arange(count, dtype=np.int64)[None]
        elif value.name.startswith("past_key_values."):
            shape = (1, decoder["num_key_value_heads"], 0, decoder["head_size"])
            feeds[value.name] = np.zeros(shape, dtype=types[value.type])
        else:
            raise Mismatch(f"the graph has an input that is not known here: {value.name}")
    options = onnxruntime.RunOptions()
    if arguments.adapter:
        require(Path(arguments.adapter).is_file(), f"{arguments.adapter}: no such file")
        adapter = onnxruntime.LoraAdapter()
        adapter.Load(str(arguments.adapter))
        options.add_active_adapter(adapter)
    (logits,) = session.run([decoder["outputs"]["logits"]], feeds, options)
    kept = logits[0] if arguments.all else logits[0, -1]
    np.save(arguments.out, kept.astype(np.float32))
    print(f"{arguments.out}: {list(kept.shape)}, highest {int(kept.reshape(-1, kept.shape[-1])[-1].argmax())}")


# -------------------------------------------------------------------------------------------------------- PEFT's files

SAFETENSORS_TYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def read_safetensors(path):
    """The header of a safetensors file after every check its format asks for, and the bytes behind it."""
    require(Path(path).is_file(), f"{path}: no such file")
    blob = np.memmap(path, dtype=np.uint8, mode="r")
    require(len(blob) >= 8, f"{path} is too short for a safetensors file")
    length = int(np.frombuffer(blob[:8].tobytes(), dtype="<u8")[0])
    require(length <= len(blob) - 8, f"{path}: the header claims {length} bytes of {len(blob)}")
    try:
        header = json.loads(blob[8 : 8 + length].tobytes())
    except ValueError as error:
        raise Mismatch(f"{path}: the header is not JSON: {error}")
    data = blob[8 + length :]
    metadata = header.pop("__metadata__", {})
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        require(entry["dtype"] in SAFETENSORS_TYPES, f"{path}: {name} has the type {entry['dtype']}")
        size = math.prod(entry["shape"]) * SAFETENSORS_TYPES[entry["dtype"]]
        require(start == end and stop - start == size, f"{path}: the bytes of {name} are not where they should be")
        end = stop
    require(end == len(data), f"{path}: {len(data) - end} bytes are left over")
    return header, metadata, data


def linear_shapes(folder):
    """[out, in] of every linear layer of a checkpoint, dense or AWQ."""
    shapes = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        header, _, _ = read_safetensors(path)
        for name, entry in header.items():
            shape = entry["shape"]
            if name.endswith(".weight") and len(shape) == 2:
                shapes[name.removesuffix(".weight")] = shape
            elif name.endswith(".qweight"):
                shapes[name.removesuffix(".qweight")] = [shape[1] * 8, shape[0]]
    require(shapes, f"{folder} has no safetensors file with linear layers")
    return shapes


def pattern_value(patterns, module, default):
    """PEFT's rank_pattern and alpha_pattern: the first regular expression that matches the end of the path."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def check_peft(arguments):
    folder = Path(arguments.folder)
    config = read_json(folder / "adapter_config.json")
    require(config.get("peft_type") == "LORA", f"adapter_config.json: peft_type is {config.get('peft_type')!r}")
    for key, kind in (("r", int), ("lora_alpha", (int, float)), ("target_modules", (list, str)), ("lora_dropout", (int, float))):
        require(isinstance(config.get(key), kind), f"adapter_config.json: {key} is {config.get(key)!r}")
    require(config.get("task_type") == "CAUSAL_LM", f"adapter_config.json: task_type is {config.get('task_type')!r}")
    require(config.get("inference_mode") is True, "adapter_config.json: inference_mode is not true, as PEFT saves it")

    header, metadata, data = read_safetensors(folder / "adapter_model.safetensors")
    require(metadata.get("format") == "pt", f"adapter_model.safetensors: its metadata is {metadata}, not format pt")
    pairs = {}
    for name, entry in header.items():
        parts = re.fullmatch(r"base_model\.model\.(.+)\.lora_(A|B)\.weight", name)
        require(parts, f"{name} is not a name PEFT knows for LoRA")
        require(entry["dtype"] == "F32", f"{name} is {entry['dtype']}; PEFT keeps adapters in F32")
        start, stop = entry["data_offsets"]
        values = np.frombuffer(data[start:stop].tobytes(), dtype="<f4")
        require(np.isfinite(values).all(), f"{name} holds a value that is not finite")
        pairs.setdefault(parts[1], {})[parts[2]] = entry["shape"]

    require(pairs, "the adapter holds no tensor")
    base = linear_shapes(arguments.base) if arguments.base else {}
    for module, shapes in sorted(pairs.items()):
        require(shapes.keys() == {"A", "B"}, f"{module} has lora_{''.join(shapes)} only")
        rank = pattern_value(config.get("rank_pattern") or {}, module, config["r"])
        (rank_a, inputs), (outputs, rank_b) = shapes["A"], shapes["B"]
        require(rank_a == rank_b == rank, f"{module}: ranks {rank_a} and {rank_b} where the config says {rank}")
        if isinstance(config["target_modules"], list):
            known = any(module == target or module.endswith(f".{target}") for target in config["target_modules"])
            require(known, f"{module} is not among target_modules {config['target_modules']}")
        if base:
            require(module in base, f"the base has no linear layer {module}")
            require(base[module] == [outputs, inputs], f"{module}: [{outputs}, {inputs}] on a base of {base[module]}")
    if isinstance(config["target_modules"], list):
        for target in config["target_modules"]:
            used = any(module == target or module.endswith(f".{target}") for module in pairs)
            require(used, f"target_modules names {target}, and no tensor is for it")
    print(f"{folder}: {len(pairs)} adapted layers, rank {config['r']}, alpha {config['lora_alpha']}{', fits the base' if base else ''}")


# ---------------------------------------------------------------------------------------------------------------- main


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("generate", help="greedy tokens of onnxruntime-genai")
    command.add_argument("folder")
    command.add_argument("--prompt-ids", type=number_list, required=True)
    command.add_argument("--adapter", type=named_file, help="name=file")
    command.add_argument("--max-new-tokens", type=int, required=True)
    command.set_defaults(run=generate)

    command = commands.add_parser("compare", help="olive's greedy tokens against onnxruntime-genai's")
    command.add_argument("folder")
    command.add_argument("olive", help="the olive binary")
    command.add_argument("--adapter", help="an .onnx_adapter file; every prompt is then run with and without it")
    command.add_argument("--prompts", help="a text file with one prompt per line; \\n stands for a new line")
    command.add_argument("--max-new-tokens", type=int, default=24)
    command.add_argument(
        "--near-tie",
        type=float,
        default=0.0,
        help="answers may part where the reference's best two scores are nearer than this; for graphs that round"
        " activations to 8 bits, where another order of additions moves a value over a rounding step",
    )
    command.add_argument("--olive-arg", action="append", default=[], help="one more argument for olive generate")
    command.set_defaults(run=compare)

    command = commands.add_parser("onnx", help="onnx.checker, external data, and loading")
    command.add_argument("folder")
    command.add_argument("--basic", action="store_true", help="without onnx's strict shape inference")
    command.set_defaults(run=check_onnx)

    command = commands.add_parser("adapter", help="names and shapes in an .onnx_adapter file")
    command.add_argument("file")
    command.add_argument("--folder", help="the model folder whose graph it has to fit")
    command.set_defaults(run=check_adapter)

    command = commands.add_parser("logits", help="logits of onnxruntime after a prompt")
    command.add_argument("folder")
    command.add_argument("--ids", type=number_list, required=True)
    command.add_argument("--out", required=True, help="the .npy file to write: [vocabulary], float32")
    command.add_argument("--all", action="store_true", help="of every position: [tokens, vocabulary]")
    command.add_argument("--adapter", help="an .onnx_adapter file")
    command.set_defaults(run=first_logits)

    command = commands.add_parser("peft", help="adapter_config.json and adapter_model.safetensors")
    command.add_argument("folder")
    command.add_argument("--base", help="the checkpoint whose layers it has to fit")
    command.set_defaults(run=check_peft)
    return parser.parse_args(arguments)


def main():
    arguments = parse(sys.argv[1:])
    try:
        arguments.run(arguments)
    except Mismatch as problem:
        print(f"check.py {arguments.command}: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
