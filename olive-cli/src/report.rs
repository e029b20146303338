//! What came of a workflow, on stdout.

use olive_core::Result;
use olive_core::workflow::engine::{Footprint, FootprintNode, Outcome};

use crate::output;

/// Prints what the input model and the best models measure, and where the best one is.
///
/// # Errors
/// [`olive_core::Error::Io`].
pub fn outcome(outcome: &Outcome) -> Result<()> {
    if let Some(build) = &outcome.build {
        output::line(&format!("build {build}"))?;
    }
    let table = table(outcome);
    if table.len() > 1 {
        output::text(&aligned(&table))?;
    }
    if outcome.ran == 0 && outcome.cached > 0 {
        tracing::info!("nothing to do: all {} runs were in the cache", outcome.cached);
    } else {
        tracing::info!("{} runs computed, {} from the cache", outcome.ran, outcome.cached);
    }
    for package in &outcome.packages {
        output::line(&format!("Packed into {}", package.display()))?;
    }
    output::saved(&outcome.output_dir)
}

/// The input model, then the front (without a search: the result); the first column of a row marks the best one.
fn table(outcome: &Outcome) -> Vec<Vec<String>> {
    let nodes = outcome.footprint.nodes();
    let inputs = nodes.iter().filter(|node| node.from_pass.is_none());
    let front = nodes
        .iter()
        .filter(|node| node.from_pass.is_some() && outcome.front.contains(&node.model_id));
    let rows: Vec<&FootprintNode> = inputs
        .chain(front)
        .filter(|node| node.metrics.is_some())
        .collect();
    let mut names: Vec<&str> = outcome.objectives.iter().map(|o| o.name.as_str()).collect();
    for node in &rows {
        for name in node.metrics.iter().flat_map(|metrics| metrics.keys()) {
            if !names.contains(&name.as_str()) {
                names.push(name);
            }
        }
    }
    if rows.is_empty() {
        return Vec::new();
    }
    let mut head = vec!["model".to_owned(), "passes".to_owned()];
    head.extend(names.iter().map(|name| (*name).to_owned()));
    let mut lines = vec![head];
    for node in rows {
        let best = if node.model_id == outcome.model_id {
            " *"
        } else {
            ""
        };
        let mut line = vec![
            format!("{}{best}", node.model_id),
            passes(&outcome.footprint, node),
        ];
        for name in &names {
            let metric = node.metrics.as_ref().and_then(|metrics| metrics.get(*name));
            line.push(metric.map_or_else(|| "-".to_owned(), |metric| number(metric.value)));
        }
        lines.push(line);
    }
    lines
}

/// The chain of passes that made a model.
fn passes(footprint: &Footprint, node: &FootprintNode) -> String {
    let mut names = Vec::new();
    let mut at = Some(node);
    while let Some(node) = at.filter(|_| names.len() <= footprint.nodes().len()) {
        names.extend(node.from_pass.clone());
        let parent = node.parent_model_id.as_ref();
        at = parent.and_then(|id| footprint.nodes().iter().find(|n| n.model_id == *id));
    }
    names.reverse();
    match names.is_empty() {
        true => "input model".to_owned(),
        false => names.join(" > "),
    }
}

/// Five digits, without an exponent for everyday sizes.
fn number(value: f64) -> String {
    if value.fract() == 0.0 && value.abs() < 1e15 {
        return format!("{value:.0}");
    }
    let digits = (4.0 - value.abs().log10().floor()).clamp(0.0, 12.0);
    format!("{value:.*}", digits as usize)
}

/// Rows with columns of one width.
fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_numbers_short() {
        let rows = [
            vec!["a".to_owned(), "bb".to_owned()],
            vec!["ccc".to_owned(), "d".to_owned()],
        ];
        assert_eq!(aligned(&rows), "a    bb\nccc  d\n");
        assert_eq!(number(61.746_231), "61.746");
        assert_eq!(number(123_456_789.0), "123456789");
    }
}
