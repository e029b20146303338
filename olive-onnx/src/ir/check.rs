//! The rules that every graph has to keep: each value is defined once and before it is read.

use std::collections::HashSet;

use super::attribute::Attribute;
use super::graph::{Graph, Node};
use crate::error::GraphError;

impl Graph {
    /// Checks that names are unique, that nodes are in topological order, and that everything read is defined, in
    /// this graph and in the branches of its nodes.
    ///
    /// # Errors
    /// The first rule that is broken, with the node or value.
    pub fn check(&self) -> Result<(), GraphError> {
        self.check_within(&HashSet::new())
    }

    fn check_within(&self, outer: &HashSet<&str>) -> Result<(), GraphError> {
        let mut defined = outer.clone();
        let mut own: HashSet<&str> = HashSet::new();
        for input in &self.inputs {
            self.define("input", &input.name, &mut own)?;
        }
        let inputs = own.clone();
        let mut defaults = HashSet::new();
        for tensor in &self.initializers {
            self.define("initializer", &tensor.name, &mut defaults)?;
            if !inputs.contains(tensor.name.as_str()) {
                self.define("initializer", &tensor.name, &mut own)?;
            }
        }
        defined.extend(&own);
        let mut names = HashSet::new();
        for node in &self.nodes {
            if !node.name.is_empty() && !names.insert(node.name.as_str()) {
                return Err(self.duplicate("node", &node.name));
            }
            self.check_node(node, &defined)?;
            for output in node.outputs.iter().filter(|name| !name.is_empty()) {
                if outer.contains(output.as_str()) {
                    return Err(self.duplicate("value", output));
                }
                self.define("value", output, &mut own)?;
                defined.insert(output);
            }
        }
        let mut outputs = HashSet::new();
        for output in &self.outputs {
            self.define("output", &output.name, &mut outputs)?;
            if !defined.contains(output.name.as_str()) {
                return Err(GraphError::UndefinedOutput {
                    graph: self.name.clone(),
                    value: output.name.clone(),
                });
            }
        }
        Ok(())
    }

    fn check_node(&self, node: &Node, defined: &HashSet<&str>) -> Result<(), GraphError> {
        if node.outputs.iter().all(String::is_empty) {
            return Err(GraphError::Malformed {
                what: format!("node `{}` ({}) has no output", node.name, node.op_type),
                graph: self.name.clone(),
            });
        }
        for input in node.inputs.iter().filter(|name| !name.is_empty()) {
            if !defined.contains(input.as_str()) {
                return Err(GraphError::Undefined {
                    node: node.name.clone(),
                    op_type: node.op_type.clone(),
                    value: input.clone(),
                });
            }
        }
        for (_, value) in &node.attributes {
            if let Attribute::Graph(branch) = value {
                branch.check_within(defined)?;
            }
        }
        Ok(())
    }

    fn define<'a>(
        &self,
        kind: &'static str,
        name: &'a str,
        names: &mut HashSet<&'a str>,
    ) -> Result<(), GraphError> {
        if name.is_empty() {
            return Err(GraphError::Malformed {
                what: format!("{kind} without a name"),
                graph: self.name.clone(),
            });
        }
        if names.insert(name) {
            Ok(())
        } else {
            Err(self.duplicate(kind, name))
        }
    }

    fn duplicate(&self, kind: &'static str, name: &str) -> GraphError {
        GraphError::Duplicate {
            kind,
            graph: self.name.clone(),
            name: name.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::{OnnxType, Tensor, ValueInfo};

    fn value(name: &str) -> ValueInfo {
        ValueInfo::new(name, OnnxType::Float, [])
    }

    fn small() -> Graph {
        Graph {
            name: "g".into(),
            inputs: vec![value("x"), value("w")],
            outputs: vec![value("z")],
            nodes: vec![
                Node::new("a", "Add", &["x", "w"], &["y"]),
                Node::new("b", "Neg", &["y"], &["z"]),
            ],
            initializers: vec![Tensor::floats("w", [], &[1.0]).unwrap()],
            value_infos: vec![],
        }
    }

    #[test]
    fn a_sound_graph_with_an_optional_input_passes() {
        let graph = small();
        graph.check().unwrap();
        assert_eq!(
            graph
                .required_inputs()
                .map(|i| i.name.as_str())
                .collect::<Vec<_>>(),
            ["x"]
        );
        assert_eq!(
            graph
                .optional_inputs()
                .map(|i| i.name.as_str())
                .collect::<Vec<_>>(),
            ["w"]
        );
    }

    #[test]
    fn each_broken_rule_is_named() {
        let broken = |change: &dyn Fn(&mut Graph)| {
            let mut graph = small();
            change(&mut graph);
            graph.check().unwrap_err().to_string()
        };
        assert!(broken(&|g| g.nodes.swap(0, 1)).contains("node `b` (Neg) reads `y`"));
        assert!(broken(&|g| g.inputs.push(value("w"))).contains("input `w` is defined twice"));
        assert!(broken(&|g| g.nodes[1].name = "a".into()).contains("node `a` is defined twice"));
        assert!(broken(&|g| g.nodes[1].outputs = vec!["x".into()]).contains("value `x` is defined twice"));
        assert!(broken(&|g| g.outputs.push(value("q"))).contains("output `q`"));
        assert!(broken(&|g| g.nodes[0].outputs.clear()).contains("has no output"));
        assert!(broken(&|g| g.initializers.push(g.initializers[0].clone())).contains("initializer `w`"));
    }

    #[test]
    fn branches_see_what_is_around_them_and_only_what_is_before() {
        let branch = |reads: &str| Graph {
            name: "branch".into(),
            outputs: vec![value("inner")],
            nodes: vec![Node::new("n", "Neg", &[reads], &["inner"])],
            ..Graph::default()
        };
        let graph = |reads: &str| {
            let mut graph = small();
            graph.nodes[1] = Node::new("b", "If", &["y"], &["z"]).with("then_branch", branch(reads));
            graph
        };
        graph("y").check().unwrap();
        assert!(graph("z").check().is_err());
    }
}
