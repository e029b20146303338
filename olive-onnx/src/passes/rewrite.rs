//! What passes change graphs with: who reads a value, reading another one instead, and removing what nothing reads.
//!
//! Values read inside the branches of a node count as read by that node.

use std::collections::{HashMap, HashSet};

use crate::ir::{Attribute, Graph, Model, Node, Opset, Tensor};

/// The branches and loop bodies of a node.
pub fn branches(node: &Node) -> impl Iterator<Item = &Graph> {
    node.attributes.iter().filter_map(|(_, value)| match value {
        Attribute::Graph(graph) => Some(graph.as_ref()),
        _ => None,
    })
}

/// The branches and loop bodies of a node, to be changed.
pub fn branches_mut(node: &mut Node) -> impl Iterator<Item = &mut Graph> {
    node.attributes.iter_mut().filter_map(|(_, value)| match value {
        Attribute::Graph(graph) => Some(graph.as_mut()),
        _ => None,
    })
}

/// Every value that a node reads, those that its branches read from around them included.
pub fn reads(node: &Node) -> Vec<&str> {
    let mut names: Vec<&str> = node
        .inputs
        .iter()
        .map(String::as_str)
        .filter(|name| !name.is_empty())
        .collect();
    for branch in branches(node) {
        names.extend(captures(branch));
    }
    names
}

/// What a branch reads from around it.
pub fn captures(branch: &Graph) -> Vec<&str> {
    let own = defined(branch);
    let inner = branch.nodes.iter().flat_map(reads);
    let outputs = branch.outputs.iter().map(|output| output.name.as_str());
    inner.chain(outputs).filter(|name| !own.contains(name)).collect()
}

/// Every name that a graph defines itself.
pub fn defined(graph: &Graph) -> HashSet<&str> {
    let inputs = graph.inputs.iter().map(|input| input.name.as_str());
    let constants = graph.initializers.iter().map(|tensor| tensor.name.as_str());
    let outputs = graph
        .nodes
        .iter()
        .flat_map(|node| node.outputs.iter().map(String::as_str));
    inputs
        .chain(constants)
        .chain(outputs)
        .filter(|name| !name.is_empty())
        .collect()
}

/// The nodes that read each value, as indices, in order and without repetition.
pub fn consumers(graph: &Graph) -> HashMap<&str, Vec<usize>> {
    let mut map: HashMap<&str, Vec<usize>> = HashMap::new();
    for (index, node) in graph.nodes.iter().enumerate() {
        for name in reads(node) {
            let list = map.entry(name).or_default();
            if list.last() != Some(&index) {
                list.push(index);
            }
        }
    }
    map
}

/// The node that makes each value, as an index.
pub fn producers(graph: &Graph) -> HashMap<&str, usize> {
    let nodes = graph.nodes.iter().enumerate();
    let outputs = nodes.flat_map(|(index, node)| node.outputs.iter().map(move |name| (name.as_str(), index)));
    outputs.filter(|(name, _)| !name.is_empty()).collect()
}

/// Names of the graph's outputs.
pub fn output_names(graph: &Graph) -> HashSet<&str> {
    graph.outputs.iter().map(|output| output.name.as_str()).collect()
}

/// Constants of a graph by name: initializers that are not the default of an input, and the values of `Constant` nodes
/// that carry a tensor.
pub fn constants(graph: &Graph) -> HashMap<&str, &Tensor> {
    let inputs: HashSet<&str> = graph.inputs.iter().map(|input| input.name.as_str()).collect();
    let initializers = graph
        .initializers
        .iter()
        .map(|tensor| (tensor.name.as_str(), tensor));
    let mut map: HashMap<&str, &Tensor> = initializers.filter(|(name, _)| !inputs.contains(name)).collect();
    for node in &graph.nodes {
        if is_op(node, "Constant")
            && let (Some(name), Some(Attribute::Tensor(value))) = (node.output(0), node.attribute("value"))
        {
            map.insert(name, value);
        }
    }
    map
}

/// Whether a node is this one of ONNX's own operators.
pub fn is_op(node: &Node, op_type: &str) -> bool {
    node.domain.is_empty() && node.op_type == op_type
}

/// Whether a node is this one of ONNX Runtime's contributed operators.
pub fn is_contrib(node: &Node, op_type: &str) -> bool {
    node.domain == crate::ir::MICROSOFT && node.op_type == op_type
}

/// Lets every node and branch read `map[name]` where it read `name`. Graph outputs keep their names.
pub fn redirect(graph: &mut Graph, map: &HashMap<String, String>) -> bool {
    let mut changed = false;
    for node in &mut graph.nodes {
        for input in &mut node.inputs {
            if let Some(new) = map.get(input.as_str()) {
                input.clone_from(new);
                changed = true;
            }
        }
        for branch in branches_mut(node) {
            changed |= redirect_branch(branch, map);
        }
    }
    changed
}

/// Lets the branches of one node read `map[name]` where they read `name`.
pub fn redirect_branches(node: &mut Node, map: &HashMap<String, String>) -> bool {
    branches_mut(node).fold(false, |changed, branch| redirect_branch(branch, map) | changed)
}

fn redirect_branch(branch: &mut Graph, map: &HashMap<String, String>) -> bool {
    let visible: HashMap<String, String> = {
        let own = defined(branch);
        let entries = map.iter().filter(|(old, _)| !own.contains(old.as_str()));
        entries.map(|(old, new)| (old.clone(), new.clone())).collect()
    };
    let mut changed = redirect(branch, &visible);
    for output in &mut branch.outputs {
        if let Some(new) = visible.get(&output.name) {
            output.name.clone_from(new);
            changed = true;
        }
    }
    changed
}

/// Gives a value another name, wherever it is defined, read or declared.
pub fn rename_value(graph: &mut Graph, old: &str, new: &str) {
    redirect(graph, &HashMap::from([(old.to_owned(), new.to_owned())]));
    let outputs = graph.nodes.iter_mut().flat_map(|node| node.outputs.iter_mut());
    let infos = graph
        .inputs
        .iter_mut()
        .chain(&mut graph.outputs)
        .chain(&mut graph.value_infos);
    let constants = graph.initializers.iter_mut().map(|tensor| &mut tensor.name);
    for name in outputs.chain(infos.map(|info| &mut info.name)).chain(constants) {
        if name == old {
            new.clone_into(name);
        }
    }
}

/// Removes nodes, constants and declarations that nothing reads, in the graph and its branches. Graph inputs and their
/// defaults stay.
pub fn remove_dead(graph: &mut Graph) -> bool {
    let mut changed = false;
    for node in &mut graph.nodes {
        for branch in branches_mut(node) {
            changed |= remove_dead(branch);
        }
    }
    let kept: Vec<bool> = {
        let mut live: HashSet<&str> = output_names(graph);
        let mut kept = vec![false; graph.nodes.len()];
        for (index, node) in graph.nodes.iter().enumerate().rev() {
            kept[index] = node.outputs.iter().any(|name| live.contains(name.as_str()));
            if kept[index] {
                live.extend(reads(node));
            }
        }
        kept
    };
    if kept.contains(&false) {
        let mut index = 0;
        graph.nodes.retain(|_| {
            index += 1;
            kept[index - 1]
        });
        changed = true;
    }
    changed | remove_unread(graph)
}

/// Removes constants that nothing reads and declarations of values that do not exist.
pub fn remove_unread(graph: &mut Graph) -> bool {
    let keep: Vec<bool> = {
        let mut live = output_names(graph);
        live.extend(graph.inputs.iter().map(|input| input.name.as_str()));
        live.extend(graph.nodes.iter().flat_map(reads));
        graph
            .initializers
            .iter()
            .map(|tensor| live.contains(tensor.name.as_str()))
            .collect()
    };
    let before = graph.initializers.len() + graph.value_infos.len();
    let mut keep = keep.into_iter();
    graph.initializers.retain(|_| keep.next().unwrap_or(true));
    let known: HashSet<String> = defined(graph).into_iter().map(str::to_owned).collect();
    graph.value_infos.retain(|info| known.contains(&info.name));
    before != graph.initializers.len() + graph.value_infos.len()
}

/// Names that no value and no node of a graph has.
pub struct FreshNames {
    taken: HashSet<String>,
}

impl FreshNames {
    /// The names of a graph and its branches are taken.
    pub fn new(graph: &Graph) -> Self {
        let mut taken = HashSet::new();
        collect_names(graph, &mut taken);
        Self { taken }
    }

    /// `base`, or `base` with the first free number behind it.
    pub fn make(&mut self, base: &str) -> String {
        let mut name = base.to_owned();
        let mut number = 1;
        while !self.taken.insert(name.clone()) {
            name = format!("{base}_{number}");
            number += 1;
        }
        name
    }
}

fn collect_names(graph: &Graph, names: &mut HashSet<String>) {
    names.extend(defined(graph).into_iter().map(str::to_owned));
    for node in &graph.nodes {
        names.insert(node.name.clone());
        for branch in branches(node) {
            collect_names(branch, names);
        }
    }
}

/// Puts the nodes into an order in which they can run, each as early as its place in the list allows. `false` and no
/// change if they are in one already; nodes of a cycle come last, where the check of the graph names them.
pub fn sort(graph: &mut Graph) -> bool {
    let order: Vec<usize> = {
        let made_by = producers(graph);
        let needs: Vec<Vec<usize>> = graph
            .nodes
            .iter()
            .map(|node| {
                reads(node)
                    .into_iter()
                    .filter_map(|name| made_by.get(name).copied())
                    .collect()
            })
            .collect();
        let mut done = vec![false; graph.nodes.len()];
        let mut order = Vec::with_capacity(done.len());
        for start in 0..done.len() {
            visit(start, &needs, &mut done, &mut order);
        }
        order
    };
    if order.iter().enumerate().all(|(place, index)| place == *index) {
        return false;
    }
    let mut nodes: Vec<Option<Node>> = std::mem::take(&mut graph.nodes).into_iter().map(Some).collect();
    graph.nodes = order
        .into_iter()
        .filter_map(|index| nodes[index].take())
        .collect();
    true
}

/// Depth first, without recursion: graphs are deeper than the stack is sure to be.
fn visit(start: usize, needs: &[Vec<usize>], done: &mut [bool], order: &mut Vec<usize>) {
    let mut open = HashSet::new();
    let mut stack = vec![(start, 0)];
    while let Some((index, next)) = stack.pop() {
        if done[index] {
            continue;
        }
        open.insert(index);
        match needs[index][next..]
            .iter()
            .position(|need| !done[*need] && !open.contains(need))
        {
            Some(offset) => {
                stack.push((index, next + offset + 1));
                stack.push((needs[index][next + offset], 0));
            }
            None => {
                done[index] = true;
                order.push(index);
            }
        }
    }
}

/// Declares that the model uses a domain, in this version where it names none.
pub fn declare_opset(model: &mut Model, domain: &str, version: i64) -> bool {
    if model.opset(domain).is_some() {
        return false;
    }
    model.opsets.push(Opset {
        domain: domain.to_owned(),
        version,
    });
    true
}

/// Sets an attribute, in its place if it is there.
pub fn set_attribute(node: &mut Node, name: &str, value: impl Into<Attribute>) {
    let value = value.into();
    match node.attributes.iter_mut().find(|(key, _)| key == name) {
        Some((_, old)) => *old = value,
        None => node.attributes.push((name.to_owned(), value)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::{OnnxType, ValueInfo};

    fn graph(nodes: Vec<Node>) -> Graph {
        Graph {
            name: "g".into(),
            inputs: vec![ValueInfo::new("x", OnnxType::Float, [])],
            outputs: vec![ValueInfo::new("y", OnnxType::Float, [])],
            nodes,
            ..Graph::default()
        }
    }

    #[test]
    fn what_nothing_reads_goes_and_inputs_with_defaults_stay() {
        let mut graph = graph(vec![
            Node::new("a", "Neg", &["x"], &["y"]),
            Node::new("b", "Add", &["x", "c"], &["dead"]),
            Node::new("d", "Neg", &["dead"], &["deader"]),
        ]);
        graph.initializers.push(Tensor::floats("c", [], &[1.0]).unwrap());
        graph.initializers.push(Tensor::floats("x", [], &[1.0]).unwrap());
        graph
            .value_infos
            .push(ValueInfo::new("dead", OnnxType::Float, []));
        assert!(remove_dead(&mut graph));
        assert_eq!(graph.nodes.len(), 1);
        assert_eq!(graph.initializers.len(), 1);
        assert!(graph.value_infos.is_empty());
        assert!(!remove_dead(&mut graph));
        graph.check().unwrap();
    }

    #[test]
    fn branches_count_as_readers_and_follow_a_rename() {
        let branch = Graph {
            name: "branch".into(),
            outputs: vec![ValueInfo::new("inner", OnnxType::Float, [])],
            nodes: vec![Node::new("n", "Neg", &["t"], &["inner"])],
            ..Graph::default()
        };
        let mut graph = graph(vec![
            Node::new("a", "Neg", &["x"], &["t"]),
            Node::new("b", "If", &["x"], &["y"]).with("then_branch", branch),
        ]);
        assert_eq!(consumers(&graph)["t"], [1]);
        assert!(!remove_dead(&mut graph));
        rename_value(&mut graph, "t", "u");
        graph.check().unwrap();
        assert_eq!(consumers(&graph)["u"], [1]);
    }

    #[test]
    fn nodes_are_sorted_and_a_sorted_list_stays() {
        let mut graph = graph(vec![
            Node::new("c", "Neg", &["b"], &["y"]),
            Node::new("b", "Neg", &["a"], &["b"]),
            Node::new("a", "Neg", &["x"], &["a"]),
        ]);
        assert!(sort(&mut graph));
        graph.check().unwrap();
        assert!(!sort(&mut graph));
    }
}
