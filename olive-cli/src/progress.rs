//! Progress: bars on a terminal, log lines elsewhere.

use std::io::IsTerminal;
use std::sync::Mutex;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use olive_core::{LogProgress, Progress};

/// What fits stderr.
pub fn for_stderr(multi: MultiProgress) -> Box<dyn Progress> {
    if std::io::stderr().is_terminal() {
        Box::new(Bars {
            multi,
            stage: Mutex::default(),
        })
    } else {
        Box::new(LogProgress::default())
    }
}

struct Bars {
    multi: MultiProgress,
    stage: Mutex<Option<ProgressBar>>,
}

impl Progress for Bars {
    fn start(&self, stage: &str, total: u64) {
        let (bar, template) = if total > 0 {
            let template = "{prefix} [{bar:30}] {pos}/{len} {elapsed} eta {eta} {wide_msg}";
            (ProgressBar::new(total), template)
        } else {
            (
                ProgressBar::new_spinner(),
                "{prefix} {spinner} {elapsed} {wide_msg}",
            )
        };
        let bar = self.multi.add(bar);
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(stage.to_owned());
        if let Ok(mut current) = self.stage.lock()
            && let Some(before) = current.replace(bar)
        {
            before.abandon();
        }
    }

    fn update(&self, done: u64, note: &str) {
        if let Ok(current) = self.stage.lock()
            && let Some(bar) = current.as_ref()
        {
            bar.set_position(done);
            bar.set_message(note.to_owned());
        }
    }

    fn finish(&self) {
        if let Ok(mut current) = self.stage.lock()
            && let Some(bar) = current.take()
        {
            bar.finish();
        }
    }
}
