//! CPU time that was used so far, in seconds.

use anyhow::{Context, Result};
use nix::time::{ClockId, clock_gettime};

/// Of all threads of a process, the ended ones too. The kernel counts it in hundredths.
pub fn of_process(pid: i32) -> Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let stat = std::fs::read_to_string(&path).with_context(|| path.clone())?;
    // The name in parentheses may have spaces.
    let rest = stat.rsplit_once(')').map(|(_, rest)| rest).context(path)?;
    let fields = rest.split_ascii_whitespace().skip(11).take(2);
    let ticks: u64 = fields.filter_map(|f| f.parse::<u64>().ok()).sum();
    Ok(ticks as f64 / 100.0)
}

pub fn of_thread() -> Result<f64> {
    let t = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?;
    Ok(t.tv_sec() as f64 + t.tv_nsec() as f64 / 1e9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_used_some() {
        let mut x = 1u64;
        while of_thread().unwrap() < 0.05 {
            x = std::hint::black_box(x.wrapping_mul(3));
        }
        assert!(of_process(std::process::id() as i32).unwrap() >= 0.04);
    }
}
