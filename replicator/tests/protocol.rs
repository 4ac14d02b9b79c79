//! The switchover's protocol, explored: the product's own two machines, a model of the two QEMUs, a link that loses what is
//! on it, and replicators that die between any two actions. Every reachable state is visited.
//!
//! The VM has a private disk, which a mirror keeps up to date: QEMU pauses with the stopped guest until the copies are equal.
//!
//! A copy that breaks off before a switchover is ordered is begun anew, with a new session and a new shadow, as often as it likes.
//!
//! Checked in each: never two running copies, and never a shadow that runs on a disk which is not the primary's last, or which the
//! daemon that filled it still has, and never a primary that comes back although the shadow ran. In each state in which nothing is left to happen: exactly one copy runs.

#[path = "protocol/world.rs"]
mod world;

use std::collections::{HashMap, VecDeque};

use world::{Primary, Shadow, World};

/// Visits every state, and returns how many there are. A violation prints the way to it.
fn explore(crashes: u8, cuts: u8, recoveries: u8) -> usize {
    let start = World::new(crashes, cuts, recoveries);
    let mut from: HashMap<World, Option<(World, &'static str)>> = HashMap::from([(start.clone(), None)]);
    let mut queue = VecDeque::from([start]);
    while let Some(w) = queue.pop_front() {
        if w.running() > 1 {
            panic!("two copies run:\n{}", way(&from, &w));
        }
        let steps = w.steps();
        // A primary that died took the VM along; if its shadow was prepared, an operator can run that.
        // One whose shadow ran and died is dead like any other.
        let lost = w.primary == Primary::Gone || w.given_up || w.ran && w.shadow == Shadow::Gone;
        if steps.is_empty() && w.running() != 1 && !lost {
            panic!(
                "nothing is left to happen, and {} copies run:\n{}",
                w.running(),
                way(&from, &w)
            );
        }
        for (name, next) in steps {
            if !from.contains_key(&next) {
                from.insert(next.clone(), Some((w.clone(), name)));
                queue.push_back(next);
            }
        }
    }
    from.len()
}

fn way(from: &HashMap<World, Option<(World, &'static str)>>, end: &World) -> String {
    let mut lines = vec![format!("{end:?}")];
    let mut at = end;
    while let Some(Some((before, name))) = from.get(at) {
        lines.push((*name).to_owned());
        at = before;
    }
    lines.reverse();
    lines.join("\n")
}

#[test]
fn one_copy_without_faults() {
    assert!(explore(0, 0, 0) > 20);
}

#[test]
fn one_copy_with_a_crash_and_two_cuts() {
    let states = explore(1, 2, 0);
    println!("{states} states");
    assert!(states > 1000);
}

#[test]
fn one_copy_with_two_crashes_and_a_cut() {
    let states = explore(2, 1, 0);
    println!("{states} states");
    assert!(states > 1000);
}

/// An operator takes the primary back, or has a shadow of unknown age run, at any moment at which that can be ordered.
#[test]
fn one_copy_when_an_operator_recovers() {
    for (crashes, cuts) in [(1, 1), (2, 0)] {
        let states = explore(crashes, cuts, 1);
        println!("{states} states");
        assert!(states > 1000);
    }
}
