//! The `olive` command: parses, calls one library function, reports.
//!
//! Exit codes: 0 when the asked-for output exists, 1 for a run that failed, 2 for a wrong command line or config.
//! Errors and logs go to stderr, data to stdout.

mod adapter_files;
mod args;
mod command;
mod demo;
mod interrupt;
mod logging;
mod output;
mod pipeline;
mod progress;
mod registry;
mod report;
mod workflow;

use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = match args::parse(std::env::args_os().collect()) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version go to stdout with 0, everything else to stderr with 2. A closed pipe is no failure.
            let _ = error.print();
            return ExitCode::from(error.exit_code() as u8);
        }
    };
    let multi = indicatif::MultiProgress::new();
    logging::init(cli.command.log_level(), multi.clone());
    let cancel = interrupt::install();
    let progress = progress::for_stderr(multi);
    match command::run(
        &cli.command,
        &command::Context {
            progress: &*progress,
            cancel: &cancel,
        },
    ) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(if error.is_usage() { 2 } else { 1 })
        }
    }
}
