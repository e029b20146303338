//! Logs on stderr, at the level of `--log_level`.

use std::io::{self, IsTerminal, Write};

use indicatif::MultiProgress;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Python's levels by Olive's numbers: 0 debug, 1 info, 2 warning, 3 error, 4 critical.
pub fn init(level: u8, progress: MultiProgress) {
    let level = match level {
        0 => LevelFilter::DEBUG,
        1 => LevelFilter::INFO,
        2 => LevelFilter::WARN,
        3 => LevelFilter::ERROR,
        _ => LevelFilter::OFF,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_target(false)
        .with_ansi(io::stderr().is_terminal())
        .with_writer(AboveProgress(progress))
        .init();
}

/// Writes above the progress bars, which are drawn again below.
struct AboveProgress(MultiProgress);

struct Line(MultiProgress);

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.suspend(|| io::stderr().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

impl<'a> MakeWriter<'a> for AboveProgress {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line(self.0.clone())
    }
}
