//! A stop is asked for once, by SIGTERM, SIGINT or the program itself, and heard by everyone who holds a [`Stop`].

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

#[derive(Clone, Debug)]
pub struct Stop(watch::Receiver<bool>);

/// Asks for the stop. When it is dropped, the stop is asked for as well.
#[derive(Debug)]
pub struct Stopper(watch::Sender<bool>);

pub fn pair() -> (Stopper, Stop) {
    let (tx, rx) = watch::channel(false);
    (Stopper(tx), Stop(rx))
}

/// A stop that SIGTERM and SIGINT ask for. Must be called within a tokio runtime.
pub fn on_signals() -> std::io::Result<Stop> {
    let (stopper, stop) = pair();
    let mut term = signal(SignalKind::terminate())?;
    let mut int = signal(SignalKind::interrupt())?;
    tokio::spawn(async move {
        let name = tokio::select! { _ = term.recv() => "SIGTERM", _ = int.recv() => "SIGINT" };
        tracing::info!("stopping on {name}");
        stopper.stop();
    });
    Ok(stop)
}

impl Stopper {
    pub fn stop(&self) {
        self.0.send_replace(true);
    }
}

impl Stop {
    pub fn is_asked(&self) -> bool {
        *self.0.borrow() || self.0.has_changed().is_err()
    }

    /// Returns once the stop is asked for.
    pub async fn asked(&mut self) {
        // An error means that the stopper is gone, which is a stop too.
        let _ = self.0.wait_for(|s| *s).await;
    }
}

/// Tells systemd that the daemon is ready. Does nothing without systemd.
pub fn notify_ready() {
    let _ = sd_notify::notify(false, &[sd_notify::NotifyState::Ready]);
}
