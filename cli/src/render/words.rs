//! Numbers and times as people read them. A value that is no number (NaN, infinite) is shown as a dash.

use jiff::Timestamp;
use jiff::tz::TimeZone;
use umbra_api::UnixMs;

const NONE: &str = "–";

/// Names come from command lines of other people's making: control characters in them must not reach the terminal.
pub fn clean(s: &str) -> String {
    s.chars()
        .map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c })
        .collect()
}

/// A number and its unit stay on one line: the blank between them becomes a no-break one, until [`unglue`].
pub fn glue(s: &str) -> String {
    const UNITS: [&str; 6] = ["%", "s", "ms", "min", "h", "d"];
    let mut out = String::with_capacity(s.len());
    for word in s.split(' ') {
        let unit = UNITS.contains(&word.trim_end_matches(['.', ',', ':', ';']));
        match (out.is_empty(), unit && out.ends_with(|c: char| c.is_ascii_digit())) {
            (true, _) => {}
            (false, true) => out.push('\u{a0}'),
            (false, false) => out.push(' '),
        }
        out.push_str(word);
    }
    out
}

pub fn unglue(s: &str) -> String {
    s.replace('\u{a0}', " ")
}

/// `512 B`, `1.5 MiB`, `12 GiB`.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = n as f64;
    let mut unit = 0;
    // 1023.5 would be rounded to '1024 MiB'.
    while value >= 1023.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{n} B"),
        _ if value < 9.95 => format!("{value:.1} {}", UNITS[unit]),
        _ => format!("{value:.0} {}", UNITS[unit]),
    }
}

/// A span of time in seconds: `340 ms`, `4.2 s`, `42 s`, `12 min`, `3 h 05 min`, `4 d 3 h`.
pub fn span(seconds: f64) -> String {
    if !seconds.is_finite() {
        return NONE.to_owned();
    }
    if seconds < 0.0 {
        return format!("-{}", span(-seconds));
    }
    let whole = seconds.round() as u64;
    match seconds {
        0.0 => "0 s".to_owned(),
        s if s < 0.9995 => format!("{:.0} ms", s * 1000.0),
        s if s < 9.95 => format!("{s:.1} s"),
        s if s < 119.5 => format!("{whole} s"),
        s if s < 7170.0 => format!("{:.0} min", s / 60.0),
        s if s < 172_800.0 => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
        _ => format!("{} d {} h", whole / 86_400, whole % 86_400 / 3600),
    }
}

/// From microseconds: `4.31 ms`.
pub fn us(n: u64) -> String {
    format!("{:.2} ms", n as f64 / 1000.0)
}

/// Since `t`; a `t` in the future (two clocks) counts as now.
pub fn age(t: UnixMs, now: UnixMs) -> String {
    span(now.since(t).max(0) as f64 / 1000.0)
}

/// Two decimals: cores, scores, ratios.
pub fn number(x: f64) -> String {
    if x.is_finite() {
        format!("{x:.2}")
    } else {
        NONE.to_owned()
    }
}

pub fn percent(x: f64) -> String {
    if x.is_finite() {
        format!("{:.0} %", x * 100.0)
    } else {
        NONE.to_owned()
    }
}

/// Whole milliseconds a second, as run-queue wait is given.
pub fn whole(x: f64) -> String {
    if x.is_finite() {
        format!("{x:.0}")
    } else {
        NONE.to_owned()
    }
}

/// The time of day, with the date before it unless it is today's.
pub fn clock(t: UnixMs, now: UnixMs, tz: &TimeZone) -> String {
    let local = |t: UnixMs| {
        Timestamp::from_millisecond(t.0)
            .ok()
            .map(|t| t.to_zoned_datetime(tz.clone()))
    };
    match (local(t), local(now)) {
        (Some(t), Some(now)) if t.date() == now.date() => t.strftime("%H:%M:%S").to_string(),
        (Some(t), _) => t.strftime("%Y-%m-%d %H:%M:%S").to_string(),
        (None, _) => t.to_string(),
    }
}

/// One character a value, as high as its share of `top`.
pub fn sparkline(values: &[f64], top: f64) -> String {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let bar = |v: f64| match v.is_finite() && top > 0.0 {
        true => BARS[((v / top).clamp(0.0, 1.0) * 7.0).round() as usize],
        false => ' ',
    };
    values.iter().map(|v| bar(*v)).collect()
}

/// `1 VM`, `2 VMs`.
pub fn count(n: usize, one: &str) -> String {
    if n == 1 {
        format!("1 {one}")
    } else {
        format!("{n} {one}s")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let shown = [0, 1023, 1024, 1536, 10 << 20, (1 << 30) - 1, u64::MAX].map(bytes);
        assert_eq!(
            shown,
            ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "10 MiB", "1.0 GiB", "16384 PiB"]
        );
    }

    #[test]
    fn spans() {
        let shown = [
            0.0,
            0.34,
            0.9999,
            4.21,
            42.4,
            720.0,
            11_100.0,
            360_000.0,
            -3.0,
            f64::NAN,
        ]
        .map(span);
        let wanted = [
            "0 s",
            "340 ms",
            "1.0 s",
            "4.2 s",
            "42 s",
            "12 min",
            "3 h 05 min",
            "4 d 4 h",
            "-3.0 s",
            "–",
        ];
        assert_eq!(shown, wanted);
        assert_eq!(age(UnixMs(5000), UnixMs(1000)), "0 s");
        assert_eq!(age(UnixMs(i64::MIN), UnixMs(i64::MAX)).chars().last(), Some('h'));
    }

    #[test]
    fn times_of_today_have_no_date() {
        let now = UnixMs(1_764_062_000_000);
        assert_eq!(clock(UnixMs(1_764_061_999_000), now, &TimeZone::UTC), "09:13:19");
        assert_eq!(
            clock(UnixMs(1_763_000_000_000), now, &TimeZone::UTC),
            "2025-11-13 02:13:20"
        );
        assert_eq!(
            clock(UnixMs(i64::MAX), now, &TimeZone::UTC),
            UnixMs(i64::MAX).to_string()
        );
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert_eq!(clean("a\x1b[31mb\u{9b}c\n"), "a\u{fffd}[31mb\u{fffd}c\n");
    }

    #[test]
    fn numbers_keep_their_units() {
        assert_eq!(
            glue("in 18 s. Of 60 %, 2 s here"),
            "in 18\u{a0}s. Of 60\u{a0}%, 2\u{a0}s here"
        );
        assert_eq!(unglue(&glue("a  b 3 min")), "a  b 3 min");
    }

    #[test]
    fn bars_stay_in_range_whatever_comes() {
        assert_eq!(sparkline(&[0.0, 0.5, 1.0, 9.0, -1.0, f64::NAN], 1.0), "▁▅██▁ ");
        assert_eq!(sparkline(&[1.0], 0.0), " ");
    }
}
