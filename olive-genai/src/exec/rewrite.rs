//! Small rewrites before a graph is compiled, each with the same result as the nodes that it replaces.

use std::collections::{HashMap, HashSet};

use olive_onnx::ir::{Graph, Node};

use super::registry::OLIVE;

/// The nodes of a graph, in order, with
/// - `Add(base, MatMul(MatMul(x, a), b))` as `LoraAdd(base, x, a, b)` where `a` and `b` are optional inputs, so that
///   an adapter that is not active costs nothing;
/// - `Gather(Transpose(w), ids)` as `GatherColumns(w, ids)`, so that a tied embedding is not transposed.
pub fn rewrite(graph: &Graph) -> Vec<Node> {
    let uses = count_uses(graph);
    let made_by: HashMap<&str, usize> = graph
        .nodes
        .iter()
        .enumerate()
        .flat_map(|(i, node)| node.outputs.iter().map(move |name| (name.as_str(), i)))
        .collect();
    let optional: HashSet<&str> = graph.optional_inputs().map(|input| input.name.as_str()).collect();
    let view = View {
        graph,
        uses,
        made_by,
        optional,
    };
    let mut replaced: HashMap<usize, Node> = HashMap::new();
    let mut gone = HashSet::new();
    for (i, node) in graph.nodes.iter().enumerate() {
        if let Some((fused, spent)) = view.lora_add(node).or_else(|| view.tied_gather(node)) {
            replaced.insert(i, fused);
            gone.extend(spent);
        }
    }
    let nodes = graph.nodes.iter().enumerate().filter(|(i, _)| !gone.contains(i));
    nodes
        .map(|(i, node)| replaced.remove(&i).unwrap_or_else(|| node.clone()))
        .collect()
}

/// How often each value is read, by nodes, by nodes of their branches, and as an output.
pub fn count_uses(graph: &Graph) -> HashMap<String, usize> {
    let mut uses = HashMap::new();
    let mut graphs = vec![graph];
    while let Some(graph) = graphs.pop() {
        let outputs = graph.outputs.iter().map(|output| &output.name);
        let inputs = graph.nodes.iter().flat_map(|node| &node.inputs);
        for name in outputs.chain(inputs) {
            *uses.entry(name.clone()).or_insert(0) += 1;
        }
        graphs.extend(branches(graph.nodes.iter()));
    }
    uses
}

/// Graphs in the attributes of nodes.
pub fn branches<'g>(nodes: impl Iterator<Item = &'g Node>) -> Vec<&'g Graph> {
    let attributes = nodes.flat_map(|node| node.attributes.iter());
    attributes
        .filter_map(|(_, attribute)| match attribute {
            olive_onnx::ir::Attribute::Graph(graph) => Some(graph.as_ref()),
            _ => None,
        })
        .collect()
}

struct View<'g> {
    graph: &'g Graph,
    uses: HashMap<String, usize>,
    made_by: HashMap<&'g str, usize>,
    optional: HashSet<&'g str>,
}

impl<'g> View<'g> {
    /// The node that makes `name`, if it has this operator and nothing else reads it.
    fn sole_producer(&self, name: &str, op_type: &str) -> Option<(usize, &'g Node)> {
        let index = *self.made_by.get(name)?;
        let node = &self.graph.nodes[index];
        let sole = self.uses.get(name) == Some(&1);
        (sole && node.op_type == op_type && node.domain.is_empty()).then_some((index, node))
    }

    fn lora_add(&self, node: &Node) -> Option<(Node, Vec<usize>)> {
        if node.op_type != "Add" || node.inputs.len() != 2 {
            return None;
        }
        for (base, low) in [(0, 1), (1, 0)] {
            let Some((b_index, b_node)) = self.sole_producer(&node.inputs[low], "MatMul") else {
                continue;
            };
            let Some((a_index, a_node)) = self.sole_producer(b_node.input(0)?, "MatMul") else {
                continue;
            };
            let (x, a, b) = (a_node.input(0)?, a_node.input(1)?, b_node.input(1)?);
            if !self.optional.contains(a) || !self.optional.contains(b) {
                continue;
            }
            let inputs = [node.inputs[base].as_str(), x, a, b];
            let fused = Node::new(&node.name, "LoraAdd", &inputs, &[node.output(0)?]).in_domain(OLIVE);
            return Some((fused, vec![a_index, b_index]));
        }
        None
    }

    fn tied_gather(&self, node: &Node) -> Option<(Node, Vec<usize>)> {
        if node.op_type != "Gather" || !node.domain.is_empty() || node.int("axis").ok()?.unwrap_or(0) != 0 {
            return None;
        }
        let (index, transpose) = self.sole_producer(node.input(0)?, "Transpose")?;
        let weight = transpose.input(0)?;
        let is_matrix = self
            .graph
            .initializer(weight)
            .is_some_and(|w| w.shape().len() == 2);
        let swaps = transpose.ints("perm").ok()?.is_none_or(|order| order == [1, 0]);
        if !is_matrix || !swaps || self.optional.contains(weight) {
            return None;
        }
        let inputs = [weight, node.input(1)?];
        let fused = Node::new(&node.name, "GatherColumns", &inputs, &[node.output(0)?]).in_domain(OLIVE);
        Some((fused, vec![index]))
    }
}
