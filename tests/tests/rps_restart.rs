//! The RPS is killed in the middle, and goes on from its store.

use std::time::Duration;

use anyhow::{Result, ensure};
use umbra_api::lifecycle::Stage;
use umbra_tests::lab::vm;
use umbra_tests::lab::world::{World, with_world};

fn story(world: &mut World) -> Result<()> {
    world.wait_known()?;
    world.ask("create")?;
    world.wait_stage("the shadow to be begun", |s| !matches!(s, Stage::Unprotected))?;
    world.restart_rps()?;
    world.wait_stage("a warm shadow in spite of the restart", |s| {
        matches!(s, Stage::Standby | Stage::Armed)
    })?;

    world.ask("switchover")?;
    world.restart_rps()?;
    let away = world.wait_stage("the VM to be away", |s| matches!(s, Stage::Active | Stage::Reverse))?;
    ensure!(away.summary.host.as_str() == "b", "it runs on b: {:?}", away.summary);
    world.wait_runs_on("b")?;

    world.restart_rps()?;
    world.wait_stage("the way back", |s| s == Stage::Reverse)?;
    world.ask("failback")?;
    world.restart_rps()?;
    let home = world.wait_stage("the VM to be home", |s| s == Stage::Unprotected)?;
    ensure!(home.summary.host.as_str() == "a", "it runs on a: {:?}", home.summary);
    world.wait_runs_on("a")?;
    let edges: Vec<Stage> = home.events.iter().map(|e| e.to).collect();
    ensure!(
        edges.contains(&Stage::Provisioning) && edges.contains(&Stage::FailingBack),
        "all of it is in the store: {edges:?}"
    );
    vm::wait_scrubbed(&world.lab.client, world.vm.spec.ip, Duration::from_secs(90))?;
    let stats = vm::stats(&world.lab.client, world.vm.spec.ip)?;
    ensure!(stats.errors == 0, "{} errors in the guest's memory", stats.errors);
    Ok(())
}

#[test]
fn an_rps_that_is_killed_in_each_stage_goes_on_from_its_store() {
    with_world("rps_restart", "", story);
}
