//! Which decisions are worth a row in the store. Each slot brings one a VM, and most say what the last one said; the
//! latest is always at hand in memory.

use std::collections::BTreeMap;

use umbra_api::view::{DecisionView, Mode};
use umbra_api::{DecisionId, UnixMs, VmId};

use crate::planner::{Action, Decision};

#[derive(Debug, Default)]
pub struct Recorder {
    last_id: DecisionId,
    latest: BTreeMap<VmId, DecisionView>,
    stored: BTreeMap<VmId, (Gist, UnixMs)>,
}

/// What makes a decision another one.
type Gist = (Action, &'static str, Mode);

impl Recorder {
    pub fn new(last_id: DecisionId) -> Self {
        Self {
            last_id,
            ..Self::default()
        }
    }

    pub fn latest(&self, vm: VmId) -> Option<&DecisionView> {
        self.latest.get(&vm)
    }

    /// Keeps a decision; gives it back if it is to be stored. One that isn't shares its id with the last that was.
    pub fn take(&mut self, d: &Decision, mode: Mode, every_s: f64, now: UnixMs) -> Option<DecisionView> {
        let gist = (d.action.clone(), d.class, mode);
        let again = |(old, t): &(Gist, UnixMs)| *old == gist && (now.since(*t) as f64) < every_s * 1000.0;
        let store = d.action != Action::Nothing || !self.stored.get(&d.vm).is_some_and(again);
        let id = match self.latest.get(&d.vm) {
            Some(latest) if !store => latest.id,
            _ => {
                self.last_id = DecisionId(self.last_id.0.saturating_add(1));
                self.last_id
            }
        };
        let view = DecisionView {
            id,
            t: now,
            vm: d.vm,
            mode,
            stage: d.stage,
            action: d.action.name().to_owned(),
            because: d.because.clone(),
            inputs: d.inputs.clone(),
            hosts: d.hosts.clone(),
        };
        self.latest.insert(d.vm, view.clone());
        if store {
            self.stored.insert(d.vm, (gist, now));
        }
        store.then_some(view)
    }
}

#[cfg(test)]
mod tests {
    use umbra_api::lifecycle::Stage;
    use umbra_api::view::DecisionInputs;

    use super::*;

    fn decision(class: &'static str) -> Decision {
        Decision {
            vm: VmId(uuid::Uuid::nil()),
            stage: Stage::Unprotected,
            action: Action::Nothing,
            reason: None,
            class,
            because: class.into(),
            inputs: DecisionInputs::default(),
            hosts: Vec::new(),
        }
    }

    #[test]
    fn only_what_says_something_new_is_stored() {
        let mut r = Recorder::new(DecisionId(7));
        let mut take = |d: &Decision, t| r.take(d, Mode::Act, 60.0, UnixMs(t)).map(|v| v.id.0);
        assert_eq!(take(&decision("quiet"), 0), Some(8));
        assert_eq!(take(&decision("quiet"), 1_000), None);
        assert_eq!(take(&decision("cooldown"), 2_000), Some(9));
        assert_eq!(take(&decision("cooldown"), 61_999), None);
        assert_eq!(take(&decision("cooldown"), 62_000), Some(10));
        let act = Decision {
            action: Action::Switch,
            ..decision("switch")
        };
        assert_eq!((take(&act, 63_000), take(&act, 63_001)), (Some(11), Some(12)));
        assert_eq!(r.latest(VmId(uuid::Uuid::nil())).unwrap().action, "switch");
    }
}
