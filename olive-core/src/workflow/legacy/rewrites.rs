//! The rewrites of the table that are more than another name.

use serde_json::{Map, Value, json};

type Object = Map<String, Value>;
type Rewritten = std::result::Result<bool, String>;

fn take_object(object: &mut Object, key: &str) -> std::result::Result<Object, String> {
    match object.shift_remove(key) {
        Some(Value::Object(inner)) => Ok(inner),
        Some(Value::Null) | None => Ok(Object::new()),
        Some(_) => Err("an object".to_owned()),
    }
}

/// Puts `entries` under `object[key]`, beside what is there.
fn merge(object: &mut Object, key: &str, entries: Object) -> std::result::Result<(), String> {
    if entries.is_empty() {
        return Ok(());
    }
    let target = object.entry(key).or_insert_with(|| Value::Object(Object::new()));
    if target.is_null() {
        *target = Value::Object(Object::new());
    }
    let target = target
        .as_object_mut()
        .ok_or_else(|| format!("an object under `{key}`"))?;
    for (name, entry) in entries {
        if target.get(&name).is_some_and(|other| *other != entry) {
            return Err(format!("one value of `{name}`"));
        }
        target.insert(name, entry);
    }
    Ok(())
}

pub fn data_config_list(top: &mut Object) -> Rewritten {
    let Some(Value::Object(_)) = top.get("data_configs") else {
        return Ok(false);
    };
    let configs = take_object(top, "data_configs")?;
    let mut list = Vec::new();
    for (name, config) in configs {
        let Value::Object(config) = config else {
            return Err(format!("an object under `{name}`"));
        };
        let mut named = Object::new();
        named.insert("name".to_owned(), Value::String(name));
        for (key, entry) in config {
            named.entry(key).or_insert(entry);
        }
        list.push(Value::Object(named));
    }
    top.insert("data_configs".to_owned(), Value::Array(list));
    Ok(true)
}

pub fn pass_flows(top: &mut Object) -> Rewritten {
    let expected = || "a list of lists of names of passes".to_owned();
    let flows = match top.shift_remove("pass_flows") {
        Some(Value::Array(flows)) => flows,
        Some(Value::Null) | None => return Ok(true),
        Some(_) => return Err(expected()),
    };
    let mut names: Vec<Vec<String>> = Vec::new();
    for flow in &flows {
        let flow = flow.as_array().ok_or_else(expected)?;
        let flow: Option<Vec<String>> = flow.iter().map(|n| n.as_str().map(str::to_owned)).collect();
        names.push(flow.ok_or_else(expected)?);
    }
    if let [flow] = names.as_slice() {
        let mut passes = take_object(top, "passes")?;
        let mut ordered = Object::new();
        for name in flow {
            let pass = passes
                .shift_remove(name)
                .ok_or_else(|| format!("a pass named `{name}`"))?;
            ordered.insert(name.clone(), pass);
        }
        top.insert("passes".to_owned(), Value::Object(ordered));
    } else {
        let mut builds = Object::new();
        for (index, flow) in names.into_iter().enumerate() {
            builds.insert(format!("flow_{index}"), json!({ "pipeline": flow }));
        }
        merge(top, "builds", builds)?;
    }
    Ok(true)
}

pub fn engine_providers(top: &mut Object) -> Rewritten {
    let Some(Value::Object(engine)) = top.get_mut("engine") else {
        return Ok(false);
    };
    let mut names: Vec<String> = Vec::new();
    for key in ["host", "target"] {
        if let Some(name) = engine.get(key).and_then(Value::as_str) {
            names.push(name.to_owned());
        }
    }
    let known = |systems: Option<&Value>| {
        names
            .iter()
            .any(|name| systems.is_some_and(|s| s.get(name).is_some()))
    };
    if !engine.contains_key("execution_providers") || names.is_empty() {
        return Ok(false);
    }
    let providers = engine.get("execution_providers").cloned().unwrap_or_default();
    if !known(top.get("systems")) {
        return Ok(false);
    }
    if let Some(Value::Object(engine)) = top.get_mut("engine") {
        engine.shift_remove("execution_providers");
    }
    let Some(Value::Object(systems)) = top.get_mut("systems") else {
        return Ok(true);
    };
    for name in names {
        let Some(Value::Object(system)) = systems.get_mut(&name) else {
            continue;
        };
        accelerator_names(system)?;
        let accelerators = system.entry("accelerators").or_insert_with(|| json!([{}]));
        for accelerator in accelerators.as_array_mut().into_iter().flatten() {
            if let Value::Object(accelerator) = accelerator
                && !accelerator.contains_key("execution_providers")
            {
                accelerator.insert("execution_providers".to_owned(), providers.clone());
            }
        }
    }
    Ok(true)
}

pub fn hf_config(model: &mut Object) -> Rewritten {
    let mut hf = take_object(model, "hf_config")?;
    let kind = model.get("type").and_then(Value::as_str).unwrap_or_default();
    if !kind.eq_ignore_ascii_case("pytorchmodel") && !kind.eq_ignore_ascii_case("hfmodel") {
        // An ONNX model carried it for its task only.
        return Ok(true);
    }
    let name = hf.shift_remove("model_name");
    let task = hf.shift_remove("task").or_else(|| hf.shift_remove("feature"));
    let mut load = Object::new();
    for key in ["model_loading_args", "from_pretrained_args", "load_kwargs"] {
        for (key, entry) in take_object(&mut hf, key)? {
            load.insert(key, entry);
        }
    }
    let mut extra = take_object(&mut load, "extra_args")?;
    load.append(&mut extra);
    for dropped in ["model_class", "dataset", "feature"] {
        hf.shift_remove(dropped);
    }
    if hf.contains_key("components") {
        return Err("a model of one component".to_owned());
    }
    if let Some(other) = hf.keys().next() {
        return Err(format!(
            "`model_name`, `task` and `model_loading_args`, not `{other}`"
        ));
    }
    let mut rewritten = Object::new();
    rewritten.insert("type".to_owned(), Value::String("HfModel".to_owned()));
    // An explicit path (a registry, a local copy) is where the weights are; the name is only its label.
    let path = model
        .shift_remove("model_path")
        .filter(|path| !path.is_null())
        .or(name);
    if let Some(path) = path {
        rewritten.insert("model_path".to_owned(), path);
    }
    if let Some(task) = task.filter(|task| !task.is_null()) {
        rewritten.insert("task".to_owned(), task);
    }
    for dropped in ["type", "model_file_format", "dummy_inputs_func", "model_loader"] {
        model.shift_remove(dropped);
    }
    rewritten.append(model);
    merge(&mut rewritten, "load_kwargs", load)?;
    *model = rewritten;
    Ok(true)
}

pub fn nested_load_args(load: &mut Object) -> Rewritten {
    let mut inner = take_object(load, "model_loading_args")?;
    load.append(&mut inner);
    Ok(true)
}

pub fn system_device(system: &mut Object) -> Rewritten {
    let device = system.shift_remove("device").unwrap_or_default();
    if !system.contains_key("accelerators") && !device.is_null() {
        system.insert("accelerators".to_owned(), json!([{ "device": device }]));
    }
    Ok(true)
}

pub fn accelerator_names(system: &mut Object) -> Rewritten {
    let Some(Value::Array(accelerators)) = system.get_mut("accelerators") else {
        return Ok(false);
    };
    let mut changed = false;
    for accelerator in accelerators {
        if let Value::String(device) = accelerator {
            *accelerator = json!({ "device": device.to_ascii_lowercase() });
            changed = true;
        }
    }
    Ok(changed)
}

pub fn system_type(system: &mut Object) -> Rewritten {
    let isolated = system
        .get("type")
        .and_then(Value::as_str)
        .is_some_and(|kind| kind.eq_ignore_ascii_case("isolatedort"));
    if isolated {
        system.insert("type".to_owned(), Value::String("PythonEnvironment".to_owned()));
    }
    Ok(isolated)
}

pub fn provider_list(accelerator: &mut Object) -> Rewritten {
    let Some(provider @ Value::String(_)) = accelerator.get("execution_providers").cloned() else {
        return Ok(false);
    };
    accelerator.insert("execution_providers".to_owned(), Value::Array(vec![provider]));
    Ok(true)
}

pub fn data_components(config: &mut Object) -> Rewritten {
    let components = take_object(config, "components")?;
    for (name, component) in components {
        let target = component_key(&name)?;
        let mut entries = match component {
            Value::Object(entries) => entries,
            Value::Null => continue,
            _ => return Err(format!("an object under `{name}`")),
        };
        let params = take_object(&mut entries, "params")?;
        entries.shift_remove("name");
        entries.extend(params);
        merge(config, target, entries)?;
    }
    Ok(true)
}

fn component_key(name: &str) -> std::result::Result<&'static str, String> {
    match name.trim_end_matches("_config") {
        "load_dataset" => Ok("load_dataset_config"),
        "pre_process_data" => Ok("pre_process_data_config"),
        "post_process_data" => Ok("post_process_data_config"),
        "dataloader" => Ok("dataloader_config"),
        other => Err(format!(
            "load_dataset, pre_process_data, post_process_data or dataloader, not `{other}`"
        )),
    }
}

/// Parameters that belong to the loading of rows.
const LOAD_PARAMS: &[&str] = &[
    "data_name",
    "data_dir",
    "subset",
    "split",
    "data_files",
    "col_filters",
    "label_cols",
    "input_shapes",
    "input_names",
    "input_types",
];

pub fn data_params(config: &mut Object) -> Rewritten {
    let mut params = take_object(config, "params_config")?;
    for (name, entries) in take_object(&mut params, "component_kwargs")? {
        let target = component_key(&name)?;
        match entries {
            Value::Object(mut entries) => {
                let inner = take_object(&mut entries, "params")?;
                entries.extend(inner);
                merge(config, target, entries)?;
            }
            Value::Null => {}
            _ => return Err(format!("an object under `{name}`")),
        }
    }
    let (mut load, mut process, mut batch) = (Object::new(), Object::new(), Object::new());
    for (key, entry) in params {
        let target = match key.as_str() {
            "batch_size" | "drop_last" | "shuffle" => &mut batch,
            key if LOAD_PARAMS.contains(&key) => &mut load,
            _ => &mut process,
        };
        target.insert(key, entry);
    }
    merge(config, "load_dataset_config", load)?;
    merge(config, "pre_process_data_config", process)?;
    merge(config, "dataloader_config", batch)?;
    Ok(true)
}

pub fn dataset_type(process: &mut Object) -> Rewritten {
    match process.shift_remove("dataset_type") {
        Some(Value::String(kind)) if kind.eq_ignore_ascii_case("corpus") => Ok(true),
        Some(Value::Null) | None => Ok(true),
        Some(_) => Err("`corpus`; write pairs as one `text_template` over both columns".to_owned()),
    }
}

pub fn metric_sub_type(metric: &mut Object) -> Rewritten {
    let mut sub = Object::new();
    sub.insert(
        "name".to_owned(),
        metric.shift_remove("sub_type").unwrap_or_default(),
    );
    for key in [
        "metric_config",
        "priority",
        "priority_rank",
        "higher_is_better",
        "goal",
    ] {
        if let Some(entry) = metric.shift_remove(key) {
            sub.insert(key.to_owned(), entry);
        }
    }
    if metric.contains_key("sub_types") {
        return Err("`sub_types` alone".to_owned());
    }
    metric.insert("sub_types".to_owned(), Value::Array(vec![Value::Object(sub)]));
    Ok(true)
}

pub fn search_algorithm(search: &mut Object) -> Rewritten {
    let name = search.shift_remove("search_algorithm").unwrap_or_default();
    let sampler = match name.as_str() {
        Some(name) if name.eq_ignore_ascii_case("exhaustive") => "sequential".to_owned(),
        Some(name) => name.to_ascii_lowercase(),
        None => return Ok(true),
    };
    search.insert("sampler".to_owned(), Value::String(sampler));
    Ok(true)
}

/// Names that passes had, and what they are called today.
const PASS_NAMES: &[(&str, &str)] = &[
    ("OrtPerfTuning", "OrtSessionParamsTuning"),
    ("OnnxModelOptimizer", "OnnxPeepholeOptimizer"),
    ("OrtTransformerOptimization", "OrtTransformersOptimization"),
    ("GenAIModelExporter", "ModelBuilder"),
];

pub fn pass_type(pass: &mut Object) -> Rewritten {
    let kind = pass
        .get("type")
        .and_then(Value::as_str)
        .unwrap_or_default()
        .to_owned();
    if kind.eq_ignore_ascii_case("OnnxMatMul4Quantizer") {
        return mat_mul_4_quantizer(pass);
    }
    let Some((_, today)) = PASS_NAMES.iter().find(|(old, _)| old.eq_ignore_ascii_case(&kind)) else {
        return Ok(false);
    };
    pass.insert("type".to_owned(), Value::String((*today).to_owned()));
    Ok(true)
}

/// One pass of several algorithms has become one pass for each.
fn mat_mul_4_quantizer(pass: &mut Object) -> Rewritten {
    let algorithm = pass.shift_remove("algorithm").unwrap_or_default();
    let today = match algorithm
        .as_str()
        .unwrap_or("DEFAULT")
        .to_ascii_uppercase()
        .as_str()
    {
        "DEFAULT" | "RTN" => "OnnxBlockWiseRtnQuantization",
        "HQQ" => "OnnxHqqQuantization",
        other => return Err(format!("the algorithm DEFAULT, RTN or HQQ, not {other}")),
    };
    pass.insert("type".to_owned(), Value::String(today.to_owned()));
    if today == "OnnxHqqQuantization" {
        pass.shift_remove("is_symmetric");
    }
    for dropped in ["weight_only_quant_configs", "quant_axes"] {
        pass.shift_remove(dropped);
    }
    Ok(true)
}

pub fn no_bias(pass: &mut Object) -> Rewritten {
    match pass.shift_remove("bias") {
        Some(Value::String(bias)) if bias == "none" => Ok(true),
        Some(Value::Null) | None => Ok(true),
        Some(_) => Err("none".to_owned()),
    }
}

/// `QInt8` is `int8`, `QUInt8` is `uint8`, …
fn precision(value: &Value) -> Option<Value> {
    let name = value.as_str()?.to_ascii_lowercase();
    let rest = name.strip_prefix('q')?;
    Some(Value::String(rest.to_owned()))
}

pub fn weight_type(pass: &mut Object) -> Rewritten {
    let value = pass.shift_remove("weight_type").unwrap_or_default();
    let value = precision(&value).unwrap_or(value);
    pass.insert("precision".to_owned(), value);
    Ok(true)
}

pub fn activation_type(pass: &mut Object) -> Rewritten {
    let Some(today) = pass.get("activation_type").and_then(precision) else {
        return Ok(false);
    };
    pass.insert("activation_type".to_owned(), today);
    Ok(true)
}

/// An option of ONNX Runtime's quantizer beside the pass's own parameters.
pub fn ort_quant_option(pass: &mut Object) -> Rewritten {
    let mut options = Object::new();
    if let Some(value) = pass.shift_remove("MatMulConstBOnly") {
        options.insert("MatMulConstBOnly".to_owned(), value);
    }
    merge(pass, "extra_options", options)?;
    Ok(true)
}

/// Metrics at the top, which evaluators call by name.
pub fn named_metrics(top: &mut Object) -> Rewritten {
    let Some(Value::Array(metrics)) = top.shift_remove("metrics") else {
        return Err("a list of metrics".to_owned());
    };
    let by_name = |name: &str| {
        let found = metrics
            .iter()
            .find(|metric| metric.get("name").and_then(Value::as_str) == Some(name));
        found
            .cloned()
            .ok_or_else(|| format!("a metric of the name `{name}`"))
    };
    let Some(Value::Object(evaluators)) = top.get_mut("evaluators") else {
        return Ok(true);
    };
    for evaluator in evaluators.values_mut() {
        let Some(Value::Array(own)) = evaluator.get_mut("metrics") else {
            continue;
        };
        for metric in own {
            if let Value::String(name) = metric {
                *metric = by_name(name)?;
            }
        }
    }
    Ok(true)
}
