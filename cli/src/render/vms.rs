//! `umbra vm list`

use std::collections::BTreeMap;

use comfy_table::{Cell, Color};
use umbra_api::HostId;
use umbra_api::view::VmSummary;

use super::words::{number, whole};
use super::{Look, cell, stage_cell};

pub fn list(look: &Look, vms: &[VmSummary]) -> String {
    if vms.is_empty() {
        return "No VM is known yet.".to_owned();
    }
    let mut times: BTreeMap<&str, usize> = BTreeMap::new();
    for v in vms {
        *times.entry(v.name.as_str()).or_default() += 1;
    }
    let mut sorted: Vec<&VmSummary> = vms.iter().collect();
    sorted.sort_by(|a, b| a.name.cmp(&b.name).then(a.vm.cmp(&b.vm)));
    let rows = sorted
        .into_iter()
        .map(|v| row(v, times.get(v.name.as_str()).is_some_and(|n| *n > 1)))
        .collect();
    let header = ["VM", "HOST", "STAGE", "CORES", "WAIT ms/s", "CPS", "LIMIT", "SHADOW"];
    look.table(&header, &[3, 4, 5, 6], rows)
}

/// A name that several VMs have is followed by the UUID, since the name alone would not do for a command.
fn row(v: &VmSummary, shared_name: bool) -> Vec<Cell> {
    let name = if shared_name {
        format!("{} {}", v.name, v.vm)
    } else {
        v.name.clone()
    };
    let cps = Cell::new(number(v.cps));
    vec![
        cell(&name),
        cell(&place(v)),
        stage_cell(v.stage),
        Cell::new(number(v.cpu_demand)),
        Cell::new(whole(v.wait_ms_per_s)),
        if v.cps > v.threshold { cps.fg(Color::Red) } else { cps },
        Cell::new(number(v.threshold)),
        cell(&shadow(v)),
    ]
}

pub fn place(v: &VmSummary) -> String {
    if v.host == v.home {
        v.host.to_string()
    } else {
        format!("{} (home {})", v.host, v.home)
    }
}

pub fn shadow(v: &VmSummary) -> String {
    match (&v.shadow, v.protect) {
        (Some(h), _) => HostId::to_string(h),
        (None, true) => "–".to_owned(),
        (None, false) => "opted out".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::sample::{look, summary};
    use umbra_api::lifecycle::Stage;

    #[test]
    fn a_line_each_in_the_order_of_names() {
        let mut away = summary(3, "mail");
        away.host = "b".parse().unwrap();
        away.stage = Stage::FailingBack;
        away.cps = 0.0;
        let mut out = summary(2, "neighbour");
        (out.stage, out.shadow, out.protect) = (Stage::Unprotected, None, false);
        assert_eq!(
            list(&look(), &[summary(1, "web"), out, away]),
            "\
VM         HOST        STAGE         CORES  WAIT ms/s   CPS  LIMIT  SHADOW
mail       b (home a)  failing back   0.42          4  0.00   0.60  b
neighbour  a           unprotected    0.42          4  0.91   0.60  opted out
web        a           standby        0.42          4  0.91   0.60  b"
        );
    }

    #[test]
    fn equal_names_carry_their_uuid_and_still_fit() {
        let text = list(&look(), &[summary(1, "web"), summary(2, "web")]);
        assert!(text.lines().all(|l| l.chars().count() <= 80), "{text}");
        assert!(
            text.replace(char::is_whitespace, "").contains("00000002-0000"),
            "{text}"
        );
    }

    #[test]
    fn hostile_names_are_defused() {
        let text = list(&look(), &[summary(1, &format!("x\x1b]0;y\x07{}", "long".repeat(40)))]);
        assert!(!text.contains('\x1b') && !text.contains('\x07'));
        assert!(text.lines().all(|l| l.chars().count() <= 80), "{text}");
    }
}
