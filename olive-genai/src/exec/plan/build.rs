//! From a graph to steps.

use std::collections::{HashMap, HashSet};

use olive_core::{Error, Result};
use olive_onnx::ir::{self, Graph, Model, Node, OnnxType};

use super::super::cache::KvCache;
use super::super::context::{BuildContext, OpContext, Pool, Rounded, RunState, Source};
use super::super::registry::{OLIVE, Op, builder};
use super::super::rewrite::{branches, count_uses, rewrite};
use super::super::value::Value;
use super::{Branch, GraphNames, Inputs, Plan, PlanInfo, Step, Work};

/// Operators that are computed at load when all they read is constant.
const FOLDED: [&str; 13] = [
    "Constant",
    "Shape",
    "Gather",
    "Reshape",
    "Cast",
    "Concat",
    "Unsqueeze",
    "Squeeze",
    "Slice",
    "Add",
    "Sub",
    "Mul",
    "Div",
];
/// Larger results are left to be computed when needed.
const LARGEST_FOLD: usize = 1 << 16;

struct Compiler<'g> {
    names: HashMap<String, Source>,
    tensors: HashMap<&'g str, &'g ir::Tensor>,
    constants: Vec<Value>,
    optional: Vec<bool>,
    uses: HashMap<String, usize>,
    slots: usize,
    problems: Vec<String>,
}

impl Plan {
    /// Compiles the graph of a model.
    ///
    /// # Errors
    /// [`Error::Unsupported`] that names every node that cannot be run, or an input that cannot be given.
    pub fn new(model: Model, names: &GraphNames) -> Result<Self> {
        let graph = &model.graph;
        let mut compiler = Compiler {
            names: HashMap::new(),
            tensors: HashMap::new(),
            constants: Vec::new(),
            optional: Vec::new(),
            uses: count_uses(graph),
            slots: 0,
            problems: Vec::new(),
        };
        let (inputs, layers) = compiler.bind_inputs(graph, names)?;
        let optional = compiler.bind_optional(graph)?;
        compiler.tensors = graph.initializers.iter().map(|t| (t.name.as_str(), t)).collect();
        for input in graph.optional_inputs() {
            compiler.tensors.remove(input.name.as_str());
        }
        let nodes = rewrite(graph);
        let ignored = present_outputs(graph, names)?;
        let mut steps = compiler.steps(&nodes, &ignored);
        if !compiler.problems.is_empty() {
            let what = format!("{} node(s) of the graph", compiler.problems.len());
            return Err(Error::unsupported(what, compiler.problems.join("; ")));
        }
        let logits = match compiler.names.get(&names.logits) {
            Some(Source::Slot(slot)) => *slot,
            _ => {
                return Err(Error::unsupported(
                    "the graph",
                    format!("it computes no output `{}`", names.logits),
                ));
            }
        };
        mark_last_uses(&mut steps, logits);
        let info = PlanInfo {
            layers,
            rope_threshold: rope_threshold(&nodes, &compiler),
            optional_inputs: graph.optional_inputs().cloned().collect(),
            lora_pairs: lora_pairs(&nodes),
            steps: steps.len(),
        };
        let head = find_head(&steps, &nodes, &compiler, &names.logits);
        Ok(Self {
            slots: compiler.slots,
            constants: compiler.constants,
            steps,
            optional,
            inputs,
            logits,
            head,
            info,
            _model: model,
        })
    }
}

impl<'g> Compiler<'g> {
    fn slot(&mut self) -> usize {
        self.slots += 1;
        self.slots - 1
    }

    fn constant(&mut self, value: Value, optional: bool) -> usize {
        self.constants.push(value);
        self.optional.push(optional);
        self.constants.len() - 1
    }

    fn bind_inputs(&mut self, graph: &Graph, names: &GraphNames) -> Result<(Inputs, usize)> {
        let mut inputs = Inputs {
            ids: None,
            mask: None,
            positions: None,
        };
        let mut layers = HashSet::new();
        let mut unknown = Vec::new();
        for input in graph.required_inputs() {
            let name = input.name.as_str();
            let key = GraphNames::layer(&names.past_key, name);
            if let Some(layer) = key.or_else(|| GraphNames::layer(&names.past_value, name)) {
                layers.insert(layer);
                self.names.insert(name.to_owned(), Source::Cache(layer));
                continue;
            }
            let place = match name {
                _ if name == names.input_ids => &mut inputs.ids,
                _ if name == names.attention_mask => &mut inputs.mask,
                _ if name == names.position_ids => &mut inputs.positions,
                _ => {
                    unknown.push(format!("`{name}`"));
                    continue;
                }
            };
            let slot = self.slots;
            *place = Some((slot, input.dtype == Some(OnnxType::Int32)));
            self.slots += 1;
            self.names.insert(name.to_owned(), Source::Slot(slot));
        }
        if !unknown.is_empty() {
            return Err(Error::unsupported(
                format!("graph input(s) {}", unknown.join(", ")),
                "token ids, mask, positions and caches are given",
            ));
        }
        if inputs.ids.is_none() {
            return Err(Error::unsupported(
                "the graph",
                format!("it has no input `{}`", names.input_ids),
            ));
        }
        let count = layers.len();
        match (0..count).find(|layer| !layers.contains(layer)) {
            Some(layer) => Err(Error::unsupported(
                "the graph",
                format!("layer {layer} has no cache"),
            )),
            None => Ok((inputs, count)),
        }
    }

    fn bind_optional(&mut self, graph: &Graph) -> Result<HashMap<String, usize>> {
        let mut optional = HashMap::new();
        for input in graph.optional_inputs() {
            if let Some(tensor) = graph.initializer(&input.name) {
                let index = self.constant(Value::from_ir(tensor)?, true);
                self.names.insert(input.name.clone(), Source::Constant(index));
                optional.insert(input.name.clone(), index);
            }
        }
        Ok(optional)
    }

    /// Where `name` is found; constants are read when first asked for.
    fn source(&mut self, name: &str) -> Result<Source> {
        if name.is_empty() {
            return Ok(Source::Absent);
        }
        if let Some(source) = self.names.get(name) {
            return Ok(*source);
        }
        let Some(tensor) = self.tensors.get(name) else {
            return Err(Error::unsupported(format!("`{name}`"), "nothing defines it"));
        };
        let source = Source::Constant(self.constant(Value::from_ir(tensor)?, false));
        self.names.insert(name.to_owned(), source);
        Ok(source)
    }

    fn steps(&mut self, nodes: &'g [Node], ignored: &HashSet<String>) -> Vec<Step> {
        let mut steps = Vec::new();
        for node in nodes {
            match self.step(node, ignored) {
                Ok(Some(step)) => steps.push(step),
                Ok(None) => {}
                Err(error) => {
                    self.problems.push(error.to_string());
                    // Later nodes still find their inputs, so that every unsupported node is named.
                    for name in &node.outputs {
                        let slot = self.slot();
                        self.names.entry(name.clone()).or_insert(Source::Slot(slot));
                    }
                }
            }
        }
        steps
    }

    fn step(&mut self, node: &'g Node, ignored: &HashSet<String>) -> Result<Option<Step>> {
        let inputs: Vec<Source> = node
            .inputs
            .iter()
            .map(|name| self.source(name))
            .collect::<Result<_>>()?;
        let reads_cache = inputs.iter().any(|source| matches!(source, Source::Cache(_)));
        if reads_cache && node.op_type != "GroupQueryAttention" {
            let what = format!("node `{}` ({})", node.name, node.op_type);
            return Err(Error::unsupported(what, "only GroupQueryAttention reads a cache"));
        }
        let work = if node.op_type == "If" && node.domain.is_empty() {
            Work::If(Box::new(self.branches(node)?))
        } else {
            let op = self.op(node, &inputs)?;
            if self.folds(node, &inputs) && self.fold(node, op.as_ref(), &inputs) {
                return Ok(None);
            }
            Work::Op(op)
        };
        let mut outputs = Vec::new();
        for name in &node.outputs {
            let wanted = !name.is_empty() && !ignored.contains(name) && self.uses.contains_key(name);
            let slot = wanted.then(|| self.slot());
            if let Some(slot) = slot {
                self.names.insert(name.clone(), Source::Slot(slot));
            }
            outputs.push(slot);
        }
        let dying = vec![false; inputs.len()];
        Ok(Some(Step {
            name: node.name.clone(),
            work,
            inputs,
            dying,
            outputs,
            free: Vec::new(),
        }))
    }

    fn op(&self, node: &Node, inputs: &[Source]) -> Result<Box<dyn Op>> {
        let Some(build) = builder(&node.domain, &node.op_type) else {
            let domain = if node.domain.is_empty() {
                "ai.onnx"
            } else {
                &node.domain
            };
            let what = format!("node `{}`", node.name);
            return Err(Error::unsupported(
                what,
                format!("there is no operator {domain}::{}", node.op_type),
            ));
        };
        build(&BuildContext {
            node,
            initializers: &self.tensors,
            inputs,
            constants: &self.constants,
            optional: &self.optional,
        })
    }

    fn folds(&self, node: &Node, inputs: &[Source]) -> bool {
        let constant = |source: &Source| match source {
            Source::Constant(c) => !self.optional[*c],
            other => *other == Source::Absent,
        };
        FOLDED.contains(&node.op_type.as_str()) && node.domain != OLIVE && inputs.iter().all(constant)
    }

    /// Computes a node now; `false` if it fails or its result is large.
    fn fold(&mut self, node: &Node, op: &dyn Op, inputs: &[Source]) -> bool {
        let size = |source: &Source| match source {
            Source::Constant(c) => self.constants[*c].shape().iter().product(),
            _ => 0usize,
        };
        let free = matches!(
            node.op_type.as_str(),
            "Constant" | "Reshape" | "Shape" | "Unsqueeze" | "Squeeze"
        );
        if node.outputs.len() != 1 || (!free && inputs.iter().map(size).sum::<usize>() > LARGEST_FOLD) {
            return false;
        }
        let mut slots = [None];
        let overrides = vec![None; self.constants.len()];
        let mut state = RunState {
            slots: &mut slots,
            constants: &self.constants,
            overrides: &overrides,
            cache: &mut KvCache::new(0, 0, 0),
            pool: &mut Pool::default(),
            rounded: &mut Rounded::default(),
        };
        let dying = vec![false; inputs.len()];
        let mut ctx = OpContext {
            state: &mut state,
            node: &node.name,
            inputs,
            dying: &dying,
            outputs: &[Some(0)],
        };
        if op.run(&mut ctx).is_err() {
            return false;
        }
        let [Some(value)] = slots else { return false };
        let index = self.constant(value.into_shared(), false);
        self.names
            .insert(node.outputs[0].clone(), Source::Constant(index));
        true
    }

    fn branches(&mut self, node: &'g Node) -> Result<[Branch; 2]> {
        let mut made = [Branch::default(), Branch::default()];
        for (name, made) in ["then_branch", "else_branch"].into_iter().zip(&mut made) {
            let graph = node.graph(name)?;
            let graph = graph.ok_or_else(|| {
                Error::unsupported(
                    format!("node `{}` (If)", node.name),
                    format!("it has no `{name}`"),
                )
            })?;
            if graph.outputs.len() != node.outputs.len() {
                let reason = format!(
                    "`{name}` gives {} values for {}",
                    graph.outputs.len(),
                    node.outputs.len()
                );
                return Err(Error::unsupported(format!("node `{}` (If)", node.name), reason));
            }
            let (names, tensors) = (self.names.clone(), self.tensors.clone());
            self.tensors
                .extend(graph.initializers.iter().map(|t| (t.name.as_str(), t)));
            made.steps = self.steps(&graph.nodes, &HashSet::new());
            let outputs = graph.outputs.iter().map(|output| self.source(&output.name));
            made.outputs = outputs.collect::<Result<_>>()?;
            (self.names, self.tensors) = (names, tensors);
        }
        Ok(made)
    }
}

/// Outputs that are the caches; they stay where they are. Any other output but the logits is not computed.
fn present_outputs(graph: &Graph, names: &GraphNames) -> Result<HashSet<String>> {
    let mut ignored = HashSet::new();
    for output in &graph.outputs {
        let name = output.name.as_str();
        let key = GraphNames::layer(&names.present_key, name);
        if key
            .or_else(|| GraphNames::layer(&names.present_value, name))
            .is_some()
        {
            ignored.insert(name.to_owned());
        }
    }
    let read = graph
        .nodes
        .iter()
        .chain(branches(graph.nodes.iter()).into_iter().flat_map(|g| &g.nodes));
    match read
        .flat_map(|node| &node.inputs)
        .find(|name| ignored.contains(*name))
    {
        Some(name) => Err(Error::unsupported(
            format!("graph output `{name}`"),
            "a node reads it",
        )),
        None => Ok(ignored),
    }
}

fn step_slots(step: &Step) -> Vec<usize> {
    let mut found: Vec<usize> = Vec::new();
    let mut add = |source: &Source| {
        if let Source::Slot(slot) = source {
            found.push(*slot);
        }
    };
    step.inputs.iter().for_each(&mut add);
    if let Work::If(branches) = &step.work {
        for branch in branches.iter() {
            branch.outputs.iter().for_each(&mut add);
            for step in &branch.steps {
                step_slots(step)
                    .into_iter()
                    .map(Source::Slot)
                    .for_each(|source| add(&source));
            }
        }
    }
    found
}

fn mark_last_uses(steps: &mut [Step], logits: usize) {
    let mut live = HashSet::from([logits]);
    for step in steps.iter_mut().rev() {
        let unread = step.outputs.iter().flatten().filter(|slot| !live.contains(*slot));
        step.free = unread.copied().collect();
        let used = step_slots(step);
        let last: HashSet<usize> = used.iter().copied().filter(|slot| !live.contains(slot)).collect();
        for (source, dying) in step.inputs.iter().zip(&mut step.dying) {
            *dying = matches!(source, Source::Slot(slot) if last.contains(slot));
        }
        if matches!(step.work, Work::If(_)) {
            step.dying.fill(false);
        }
        live.extend(&used);
        step.free.extend(last);
    }
}

/// The factors of each low-rank part.
fn lora_pairs(nodes: &[Node]) -> Vec<(String, String)> {
    let parts = nodes
        .iter()
        .filter(|node| node.domain == OLIVE && node.op_type == "LoraAdd");
    parts
        .map(|node| (node.inputs[2].clone(), node.inputs[3].clone()))
        .collect()
}

/// The constant that an `If` compares the length with.
fn rope_threshold(nodes: &[Node], compiler: &Compiler<'_>) -> Option<usize> {
    let condition = nodes.iter().find(|node| node.op_type == "If")?.input(0)?;
    let test = nodes
        .iter()
        .find(|node| node.output(0) == Some(condition) && node.op_type == "Greater")?;
    match compiler.names.get(test.input(1)?)? {
        Source::Constant(c) => compiler.constants[*c]
            .to_i64()?
            .first()
            .and_then(|v| usize::try_from(*v).ok()),
        _ => None,
    }
}

/// The last product before the logits, if only operators that keep rows apart come after it.
fn find_head(
    steps: &[Step],
    nodes: &[Node],
    compiler: &Compiler<'_>,
    logits: &str,
) -> Option<(usize, usize)> {
    let mut name = logits;
    loop {
        let node = nodes
            .iter()
            .find(|node| node.outputs.iter().any(|output| output == name))?;
        let sole = compiler.uses.get(name) == Some(&1);
        let index = steps
            .iter()
            .position(|step| !node.name.is_empty() && step.name == node.name)?;
        match node.op_type.as_str() {
            "MatMul" | "MatMulNBits" if sole => {
                let input = node.input(0)?;
                let only_reader = compiler.uses.get(input) == Some(&1);
                return match compiler.names.get(input) {
                    Some(Source::Slot(slot)) if only_reader => Some((index, *slot)),
                    _ => None,
                };
            }
            "Tanh" | "Cast" if sole => name = node.input(0)?,
            "Div" | "Mul" | "Add" if sole => {
                let constant = matches!(compiler.names.get(node.input(1)?), Some(Source::Constant(_)));
                name = node.input(0).filter(|_| constant)?;
            }
            _ => return None,
        }
    }
}
