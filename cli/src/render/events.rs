//! `umbra events` and `umbra decisions`: oldest first, so that the newest stands where the eye is.

use comfy_table::Cell;
use umbra_api::VmId;
use umbra_api::view::{DecisionView, LifecycleEvent, Mode, VmSummary};

use super::words::number;
use super::{Look, cell, stage_cell, words_of};

pub fn events(look: &Look, events: &[LifecycleEvent], vms: &[VmSummary]) -> String {
    if events.is_empty() {
        return "Nothing has happened.".to_owned();
    }
    let mut sorted: Vec<&LifecycleEvent> = events.iter().collect();
    sorted.sort_by_key(|e| e.t);
    let rows = sorted
        .into_iter()
        .map(|e| {
            vec![
                Cell::new(look.clock(e.t)),
                cell(&name(e.vm, vms)),
                Cell::new(words_of(e.from)),
                stage_cell(e.to),
                cell(&e.reason),
            ]
        })
        .collect();
    look.table(&["TIME", "VM", "FROM", "TO", "WHY"], &[], rows)
}

pub fn decisions(look: &Look, decisions: &[DecisionView], vms: &[VmSummary]) -> String {
    if decisions.is_empty() {
        return "Nothing has been decided yet.".to_owned();
    }
    let mut sorted: Vec<&DecisionView> = decisions.iter().collect();
    sorted.sort_by_key(|d| (d.t, d.id));
    // Doing nothing is the same in either mode.
    let undone = |d: &DecisionView| d.mode == Mode::Observe && d.action != "nothing";
    let rows = sorted
        .into_iter()
        .map(|d| {
            let action = super::explain::short(&d.action);
            vec![
                Cell::new(d.id),
                Cell::new(look.clock(d.t)),
                cell(&name(d.vm, vms)),
                cell(&if undone(d) { format!("({action})") } else { action }),
                Cell::new(number(d.inputs.cps)),
                cell(super::explain::reason(d)),
            ]
        })
        .collect();
    let table = look.table(&["ID", "TIME", "VM", "DECISION", "CPS", "WHY"], &[0, 4], rows);
    match decisions.iter().any(undone) {
        true => format!("{table}\n\n(in brackets: decided in observe mode, not done)"),
        false => table,
    }
}

/// A VM that is no longer there has no name left: the first part of its id tells it from others.
fn name(vm: VmId, vms: &[VmSummary]) -> String {
    match vms.iter().find(|v| v.vm == vm) {
        Some(v) => v.name.clone(),
        None => vm.to_string().chars().take(8).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::sample;
    use umbra_api::lifecycle::Stage;

    #[test]
    fn steps_in_the_order_of_time() {
        let list = [
            sample::event(Stage::Seeding, Stage::Standby, "the first copy is complete", 30),
            sample::event(
                Stage::Unprotected,
                Stage::Provisioning,
                "contention is expected in 18 s on host a",
                34,
            ),
        ];
        assert_eq!(
            events(&sample::look(), &list, &[sample::summary(1, "web")]),
            "\
TIME      VM   FROM         TO            WHY
09:12:46  web  unprotected  provisioning  contention is expected in 18 s on
                                          host a
09:12:50  web  seeding      standby       the first copy is complete"
        );
        assert!(events(&sample::look(), &list, &[]).contains("  00000001  "));
    }

    #[test]
    fn decisions_that_were_not_carried_out_are_marked() {
        let mut d = sample::decision();
        d.mode = Mode::Observe;
        let text = decisions(&sample::look(), &[d, sample::decision()], &[sample::summary(1, "web")]);
        assert!(text.contains("(make a shadow)") && text.contains("not done"), "{text}");
        assert!(text.lines().all(|l| l.chars().count() <= 80), "{text}");
    }
}
