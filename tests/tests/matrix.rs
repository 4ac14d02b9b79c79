//! The crash matrix on real QEMUs: what breaks, at which step, and what must come of it. The cases are data: `umbra_tests::matrix`.

use umbra_tests::lab::pair::with_pair_as;
use umbra_tests::matrix::{Fault, cases, play};

fn all(name: &str, faults: &[Fault]) {
    let cases: Vec<_> = faults.iter().flat_map(|f| cases(*f)).collect();
    with_pair_as(name, &play::spec(), play::settings(), |pair| {
        play::small_disks(pair)?;
        play::all(pair, &cases)
    });
}

#[test]
fn the_source_replicator_is_killed_at_each_step() {
    all("matrix_source", &[Fault::Source]);
}

#[test]
fn the_target_replicator_is_killed_at_each_step() {
    all("matrix_target", &[Fault::Target]);
}

#[test]
fn a_qemu_is_killed_at_each_step() {
    all("matrix_qemu", &[Fault::Shadow, Fault::Primary]);
}

#[test]
fn the_link_is_cut_or_stalls_at_each_step() {
    all("matrix_link", &[Fault::Cut, Fault::Stall]);
}

#[test]
fn a_full_disk_or_an_rps_that_is_gone_at_each_step() {
    all("matrix_rest", &[Fault::Full, Fault::Rps]);
}
