//! Printing that survives a closed pipe: `umbra-demo | head` must end through the same doors as every other run.

use std::io::{IsTerminal, Write};

macro_rules! say {
    ($($arg:tt)*) => { $crate::demo::say::line(&format!($($arg)*)) };
}
pub(crate) use say;

pub fn line(text: &str) {
    let mut out = std::io::stdout().lock();
    // Nobody may be listening any more; that is no reason to stop half way.
    let _ = writeln!(out, "{text}");
    let _ = out.flush();
}

/// A headline.
pub fn head(text: &str) {
    line(&bold(text));
}

pub fn bold(text: &str) -> String {
    styled("1", text)
}

pub fn dim(text: &str) -> String {
    styled("2", text)
}

fn styled(code: &str, text: &str) -> String {
    if std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() {
        format!("\x1b[{code}m{text}\x1b[0m")
    } else {
        text.to_owned()
    }
}
