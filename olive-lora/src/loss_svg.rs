//! The loss curve as an SVG picture; the same entries give the same bytes.

use std::fmt::Write;

use crate::train_log::LogEntry;

/// The picture's file name.
pub const SVG_FILE: &str = "loss.svg";

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 400.0;
/// Left, right, top and bottom of the plot inside the picture.
const FRAME: [f64; 4] = [64.0, 700.0, 36.0, 352.0];

/// Axes that cover all points.
struct Axes {
    steps: [f64; 2],
    losses: [f64; 2],
    tick: f64,
}

impl Axes {
    fn new(points: &[(f64, f64)]) -> Self {
        let fold = |pick: fn(&(f64, f64)) -> f64| {
            let low = points.iter().map(pick).fold(f64::INFINITY, f64::min);
            let high = points.iter().map(pick).fold(f64::NEG_INFINITY, f64::max);
            if low.is_finite() && high.is_finite() {
                [low, high]
            } else {
                [0.0, 1.0]
            }
        };
        let [first, last] = fold(|p| p.0);
        let [low, high] = fold(|p| p.1);
        let tick = nice((high - low).max(1e-3) / 5.0);
        let losses = [
            (low / tick).floor() * tick,
            ((high / tick).ceil() * tick).max(low + tick),
        ];
        Self {
            steps: [first, last.max(first + 1.0)],
            losses,
            tick,
        }
    }

    fn x(&self, step: f64) -> f64 {
        let [left, right, ..] = FRAME;
        left + (step - self.steps[0]) / (self.steps[1] - self.steps[0]) * (right - left)
    }

    fn y(&self, loss: f64) -> f64 {
        let [_, _, top, bottom] = FRAME;
        bottom - (loss - self.losses[0]) / (self.losses[1] - self.losses[0]) * (bottom - top)
    }
}

/// 1, 2 or 5 times a power of ten, at least `value`.
fn nice(value: f64) -> f64 {
    let power = 10f64.powf(value.log10().floor());
    let factor = [1.0, 2.0, 5.0].into_iter().find(|f| f * power >= value);
    factor.unwrap_or(10.0) * power
}

fn line(axes: &Axes, points: &[(f64, f64)], color: &str) -> String {
    let places: Vec<String> = points
        .iter()
        .map(|(step, loss)| format!("{:.2},{:.2}", axes.x(*step), axes.y(*loss)))
        .collect();
    format!(
        "<polyline fill=\"none\" stroke=\"{color}\" stroke-width=\"1.8\" stroke-linejoin=\"round\" points=\"{}\"/>\n",
        places.join(" ")
    )
}

/// Draws the training loss, and the evaluation loss where there is any.
pub fn draw(entries: &[LogEntry]) -> String {
    let points = |pick: fn(&LogEntry) -> Option<f64>| -> Vec<(f64, f64)> {
        let values = entries.iter().filter_map(|e| Some((e.step as f64, pick(e)?)));
        values.filter(|(_, loss)| loss.is_finite()).collect()
    };
    let (train, eval) = (points(|e| e.loss), points(|e| e.eval_loss));
    let axes = Axes::new(&[train.clone(), eval.clone()].concat());
    let [left, right, top, bottom] = FRAME;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
         font-size=\"12\" fill=\"#444\">\n<rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#fff\"/>\n"
    );
    let ticks = ((axes.losses[1] - axes.losses[0]) / axes.tick).round() as usize;
    let decimals = (-axes.tick.log10().floor()).max(0.0) as usize;
    for i in 0..=ticks {
        let loss = axes.losses[0] + axes.tick * i as f64;
        let y = axes.y(loss);
        let _ = write!(
            svg,
            "<line x1=\"{left}\" x2=\"{right}\" y1=\"{y:.2}\" y2=\"{y:.2}\" stroke=\"#ddd\"/>\n<text x=\"{:.2}\" \
             y=\"{:.2}\" text-anchor=\"end\">{loss:.decimals$}</text>\n",
            left - 8.0,
            y + 4.0
        );
    }
    for i in 0..=4 {
        let step = (axes.steps[0] + (axes.steps[1] - axes.steps[0]) * f64::from(i) / 4.0).round();
        let _ = writeln!(
            svg,
            "<text x=\"{:.2}\" y=\"{:.2}\" text-anchor=\"middle\">{step}</text>",
            axes.x(step),
            bottom + 18.0
        );
    }
    let _ = write!(
        svg,
        "<text x=\"{:.2}\" y=\"{:.2}\" text-anchor=\"middle\">step</text>\n<text x=\"{left}\" y=\"{:.2}\">loss</text>\n",
        f64::midpoint(left, right),
        bottom + 38.0,
        top - 14.0
    );
    svg.push_str(&line(&axes, &train, "#2563eb"));
    if !eval.is_empty() {
        svg.push_str(&line(&axes, &eval, "#dc2626"));
        let _ = writeln!(
            svg,
            "<text x=\"{right}\" y=\"{:.2}\" text-anchor=\"end\" fill=\"#dc2626\">evaluation</text>",
            top - 14.0
        );
    }
    svg.push_str("</svg>\n");
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(step: usize, loss: Option<f64>, eval_loss: Option<f64>) -> LogEntry {
        LogEntry {
            step,
            epoch: 0.0,
            loss,
            grad_norm: None,
            learning_rate: None,
            eval_loss,
            tokens: 0,
            tokens_per_s: None,
        }
    }

    #[test]
    fn every_point_is_inside_the_frame_and_odd_logs_are_drawn() {
        let entries: Vec<LogEntry> = (1..=50)
            .map(|i| entry(i, Some(5.0 / i as f64), (i % 10 == 0).then_some(1.0)))
            .collect();
        let svg = draw(&entries);
        assert_eq!(svg.matches("<polyline").count(), 2);
        let points = svg.split("points=\"").nth(1).unwrap().split('"').next().unwrap();
        assert_eq!(points.split(' ').count(), 50);
        for point in points.split(' ') {
            let (x, y) = point.split_once(',').unwrap();
            let (x, y): (f64, f64) = (x.parse().unwrap(), y.parse().unwrap());
            assert!(
                (FRAME[0]..=FRAME[1]).contains(&x) && (FRAME[2]..=FRAME[3]).contains(&y),
                "{point}"
            );
        }
        for odd in [
            vec![],
            vec![entry(1, Some(2.0), None)],
            vec![entry(1, Some(f64::NAN), None)],
        ] {
            assert!(draw(&odd).ends_with("</svg>\n") && !draw(&odd).contains("NaN"));
        }
    }
}
