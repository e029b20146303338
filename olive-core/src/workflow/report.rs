//! The report of a search: one HTML file that needs no other, with the front as a picture and every run in a table.

use super::engine::{Footprint, FootprintNode};
use super::search::Objective;

/// The name of the report, Olive's.
pub const FILE: &str = "pareto_frontier_footprint_chart.html";

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 440.0;
const MARGIN: f64 = 64.0;

const STYLE: &str = "body{font:15px system-ui,sans-serif;margin:2em auto;max-width:60em;color:#222}\
table{border-collapse:collapse;width:100%;font-size:13px}\
th,td{border:1px solid #ccc;padding:.3em .5em;text-align:left;vertical-align:top}\
td.n{text-align:right;font-variant-numeric:tabular-nums}tr.front{background:#e8f4ea}\
code{font-size:12px;word-break:break-word}svg text{font:12px system-ui,sans-serif}";

/// The page.
pub fn page(
    workflow: &str,
    objectives: &[Objective],
    footprint: &Footprint,
    failed: &[(String, String)],
) -> String {
    let title = format!("Workflow {}", escape(workflow));
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title>\
         <style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n"
    );
    match objectives {
        [] => page.push_str("<p>Nothing was measured.</p>\n"),
        [only] => page.push_str(&format!("<p>One objective: {}.</p>\n", escape(&only.name))),
        [x, y, ..] => page.push_str(&picture(x, y, footprint)),
    }
    page.push_str(&table(objectives, footprint));
    if !failed.is_empty() {
        page.push_str("<h2>Failed</h2>\n<table><tr><th>point</th><th>reason</th></tr>\n");
        for (point, reason) in failed {
            page.push_str(&format!(
                "<tr><td>{}</td><td>{}</td></tr>\n",
                escape(point),
                escape(reason)
            ));
        }
        page.push_str("</table>\n");
    }
    page.push_str("</body></html>\n");
    page
}

/// The chain of passes that made a model.
fn passes(footprint: &Footprint, node: &FootprintNode) -> String {
    let mut names = Vec::new();
    let mut at = Some(node);
    while let Some(node) = at {
        // Parents were added before their children, so the chain cannot be longer than the list.
        if names.len() > footprint.nodes().len() {
            break;
        }
        names.extend(node.from_pass.clone());
        let parent = node.parent_model_id.as_ref();
        at = parent.and_then(|id| footprint.nodes().iter().find(|n| n.model_id == *id));
    }
    names.reverse();
    match names.is_empty() {
        true => "input model".to_owned(),
        false => names.join(" → "),
    }
}

fn value(node: &FootprintNode, objective: &Objective) -> Option<f64> {
    let metric = node.metrics.as_ref()?.get(&objective.name)?;
    Some(metric.value).filter(|value| value.is_finite())
}

/// A scatter plot of two objectives; the front is connected.
fn picture(x: &Objective, y: &Objective, footprint: &Footprint) -> String {
    let points: Vec<(f64, f64, &FootprintNode)> = footprint
        .nodes()
        .iter()
        .filter_map(|node| Some((value(node, x)?, value(node, y)?, node)))
        .collect();
    if points.is_empty() {
        return "<p>No model has both of the first two objectives.</p>\n".to_owned();
    }
    let range = |values: &mut dyn Iterator<Item = f64>| {
        let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| {
            (l.min(v), h.max(v))
        });
        let pad = if high > low {
            (high - low) * 0.05
        } else {
            high.abs().max(1.0) * 0.05
        };
        (low - pad, high + pad)
    };
    let (x0, x1) = range(&mut points.iter().map(|p| p.0));
    let (y0, y1) = range(&mut points.iter().map(|p| p.1));
    let place = |px: f64, py: f64| {
        let across = MARGIN + (px - x0) / (x1 - x0) * (WIDTH - 2.0 * MARGIN);
        let down = HEIGHT - MARGIN - (py - y0) / (y1 - y0) * (HEIGHT - 2.0 * MARGIN);
        (across, down)
    };
    let mut svg = format!(
        "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{} against {}\">\n",
        escape(&x.name),
        escape(&y.name)
    );
    let (left, right, top, bottom) = (MARGIN, WIDTH - MARGIN, MARGIN, HEIGHT - MARGIN);
    svg.push_str(&format!(
        "<path d=\"M{left} {top}V{bottom}H{right}\" fill=\"none\" stroke=\"#888\"/>\n"
    ));
    for step in 0..=4 {
        let part = f64::from(step) / 4.0;
        let (vx, vy) = (x0 + part * (x1 - x0), y0 + part * (y1 - y0));
        let (across, _) = place(vx, y0);
        let (_, down) = place(x0, vy);
        svg.push_str(&format!(
            "<text x=\"{across:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\n",
            bottom + 18.0,
            number(vx),
            left - 6.0,
            down + 4.0,
            number(vy)
        ));
    }
    svg.push_str(&format!(
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\
         <text x=\"{left}\" y=\"{:.1}\">{}</text>\n",
        WIDTH / 2.0,
        HEIGHT - 16.0,
        escape(&x.name),
        top - 16.0,
        escape(&y.name)
    ));
    let mut front: Vec<&(f64, f64, &FootprintNode)> =
        points.iter().filter(|p| p.2.is_pareto_frontier).collect();
    front.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
    let line: Vec<String> = front
        .iter()
        .map(|p| {
            let (across, down) = place(p.0, p.1);
            format!("{across:.1},{down:.1}")
        })
        .collect();
    svg.push_str(&format!(
        "<polyline points=\"{}\" fill=\"none\" stroke=\"#2a7d3f\" stroke-dasharray=\"4 3\"/>\n",
        line.join(" ")
    ));
    for (px, py, node) in &points {
        let (across, down) = place(*px, *py);
        let color = match (node.is_pareto_frontier, node.from_pass.is_some()) {
            (true, _) => "#2a7d3f",
            (false, true) => "#9aa5b1",
            (false, false) => "#c0392b",
        };
        svg.push_str(&format!(
            "<circle cx=\"{across:.1}\" cy=\"{down:.1}\" r=\"5\" fill=\"{color}\"><title>{}: {}, {}</title></circle>\n",
            escape(&passes(footprint, node)),
            number(*px),
            number(*py)
        ));
    }
    svg.push_str("</svg>\n<p>Green: the Pareto front. Red: the input model.</p>\n");
    svg
}

fn table(objectives: &[Objective], footprint: &Footprint) -> String {
    let mut names: Vec<&str> = objectives.iter().map(|o| o.name.as_str()).collect();
    for node in footprint.nodes() {
        for name in node.metrics.iter().flat_map(|m| m.keys()) {
            if !names.contains(&name.as_str()) {
                names.push(name);
            }
        }
    }
    let mut text =
        "<h2>Runs</h2>\n<table><tr><th>model</th><th>passes</th><th>parameters of the last</th>".to_owned();
    for name in &names {
        text.push_str(&format!("<th>{}</th>", escape(name)));
    }
    text.push_str("<th>seconds</th></tr>\n");
    for node in footprint.nodes() {
        let class = if node.is_pareto_frontier {
            " class=\"front\""
        } else {
            ""
        };
        let config = match &node.pass_run_config {
            serde_json::Value::Null => String::new(),
            config => format!("<code>{}</code>", escape(&config.to_string())),
        };
        text.push_str(&format!(
            "<tr{class}><td><code>{}</code></td><td>{}</td><td>{config}</td>",
            escape(&node.model_id),
            escape(&passes(footprint, node))
        ));
        for name in &names {
            let measured = node.metrics.as_ref().and_then(|metrics| metrics.get(*name));
            let shown = measured.map_or(String::new(), |m| number(m.value));
            text.push_str(&format!("<td class=\"n\">{shown}</td>"));
        }
        let seconds = match &node.from_pass {
            Some(_) => format!("{:.2}", node.end_time - node.start_time),
            None => String::new(),
        };
        text.push_str(&format!("<td class=\"n\">{seconds}</td></tr>\n"));
    }
    text.push_str("</table>\n");
    text
}

/// Five digits, without an exponent for everyday sizes.
fn number(value: f64) -> String {
    if value.fract() == 0.0 && value.abs() < 1e15 {
        return format!("{value:.0}");
    }
    let digits = (4.0 - value.abs().log10().floor()).clamp(0.0, 12.0);
    format!("{value:.*}", digits as usize)
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            c => escaped.push(c),
        }
    }
    escaped
}
