//! Ctrl-C: the first stops at the next safe point, the second at once.

use olive_core::CancelToken;

/// Installs the handler; the token is cancelled by the first Ctrl-C.
pub fn install() -> CancelToken {
    let token = CancelToken::default();
    let handler = {
        let token = token.clone();
        move || {
            if token.is_cancelled() {
                std::process::exit(1);
            }
            token.cancel();
            eprintln!("stopping; press Ctrl-C again to stop at once");
        }
    };
    if let Err(error) = ctrlc::set_handler(handler) {
        tracing::warn!("Ctrl-C will stop the run at once: {error}");
    }
    token
}
