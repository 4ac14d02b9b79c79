//! Both hosts on one L2 network: the VM keeps its addresses, and QEMU's announce-self tells the switches its new port.

use umbra_api::order::{Announce, OrderKind};

use super::{Effect, Move, Redirect};

#[derive(Clone, Debug, Default)]
pub struct AnnounceSelf {
    pub announce: Announce,
}

impl Redirect for AnnounceSelf {
    fn name(&self) -> &'static str {
        "announce"
    }

    fn prepare(&self, _: &Move) -> Result<Vec<Effect>, String> {
        Ok(Vec::new())
    }

    fn commit(&self, mv: &Move) -> Vec<Effect> {
        vec![Effect::Order {
            to: mv.to.clone(),
            kind: OrderKind::Announce {
                announce: self.announce,
            },
        }]
    }

    /// A shadow that never ran never sent a frame: the switches still know the old port.
    fn rollback(&self, _: &Move) -> Vec<Effect> {
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use umbra_api::{Epoch, VmId};

    use super::*;

    #[test]
    fn the_new_host_is_told_to_announce_and_the_old_one_is_left_alone() {
        let mv = Move {
            vm: VmId(uuid::Uuid::nil()),
            name: "web".into(),
            from: "a".parse().unwrap(),
            to: "b".parse().unwrap(),
            epoch: Epoch(2),
        };
        let adapter = AnnounceSelf::default();
        assert_eq!(adapter.prepare(&mv), Ok(vec![]));
        let [Effect::Order { to, kind }] = &adapter.commit(&mv)[..] else {
            panic!("one order was expected")
        };
        assert_eq!((to.as_str(), kind.name()), ("b", "announce"));
        assert!(adapter.rollback(&mv).is_empty());
    }
}
