//! Progress, estimates and interruption of long work.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// A shared flag that asks long work to stop at its next safe point.
#[derive(Debug, Clone, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// Asks for the stop.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether a stop was asked for.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Returns early out of work that was asked to stop.
    ///
    /// # Errors
    /// [`Error::Cancelled`] once [`CancelToken::cancel`] was called.
    pub fn check(&self) -> Result<()> {
        if self.is_cancelled() {
            Err(Error::Cancelled)
        } else {
            Ok(())
        }
    }
}

/// Where long work says how far it is.
pub trait Progress: Send + Sync {
    /// A stage of `total` steps begins; `0` where the number is not known.
    fn start(&self, stage: &str, total: u64);
    /// `done` of the stage's steps are finished; `note` says what is notable (a loss, a layer).
    fn update(&self, done: u64, note: &str);
    /// The stage is over.
    fn finish(&self);
}

/// Says nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn start(&self, _stage: &str, _total: u64) {}
    fn update(&self, _done: u64, _note: &str) {}
    fn finish(&self) {}
}

/// Logs each step at level INFO, with an estimate of the time left.
#[derive(Debug, Default)]
pub struct LogProgress {
    stage: std::sync::Mutex<Option<(String, u64, Instant)>>,
}

impl Progress for LogProgress {
    fn start(&self, stage: &str, total: u64) {
        tracing::info!("{stage} …");
        if let Ok(mut current) = self.stage.lock() {
            *current = Some((stage.to_owned(), total, Instant::now()));
        }
    }

    fn update(&self, done: u64, note: &str) {
        let Ok(current) = self.stage.lock() else { return };
        if let Some((stage, total, since)) = current.as_ref() {
            let left = estimate(since.elapsed(), done, *total);
            let left = left
                .map(|l| format!(", {:.0} s left", l.as_secs_f64()))
                .unwrap_or_default();
            tracing::info!("{stage}: {done}/{total}{left} {note}");
        }
    }

    fn finish(&self) {
        if let Ok(mut current) = self.stage.lock()
            && let Some((stage, _, since)) = current.take()
        {
            tracing::info!("{stage}: done in {:.1} s", since.elapsed().as_secs_f64());
        }
    }
}

/// The time left if the rest goes as fast as what is done; `None` before the first step.
pub fn estimate(elapsed: Duration, done: u64, total: u64) -> Option<Duration> {
    if done == 0 || total < done {
        return None;
    }
    Some(elapsed.mul_f64((total - done) as f64 / done as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_estimate_scales_what_is_left() {
        assert_eq!(
            estimate(Duration::from_secs(10), 2, 8),
            Some(Duration::from_secs(30))
        );
        assert_eq!(estimate(Duration::from_secs(10), 0, 8), None);
    }

    #[test]
    fn a_cancelled_token_stops_every_clone() {
        let token = CancelToken::default();
        let clone = token.clone();
        assert!(clone.check().is_ok());
        token.cancel();
        assert!(matches!(clone.check(), Err(Error::Cancelled)));
    }
}
