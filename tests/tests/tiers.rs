//! What a waiting shadow costs its host by tier, and that nothing of its memory is lost on the way to swap and back.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use umbra_api::order::Tier;
use umbra_api::replica::Role;
use umbra_tests::lab::daemons::Settings;
use umbra_tests::lab::pair::{Pair, with_pair_as};
use umbra_tests::lab::process::wait_for;
use umbra_tests::lab::swap;
use umbra_tests::lab::vm::VmSpec;

/// Rests of the replicator's between two looks are seconds, and the machine may be busy.
const SOON: Duration = Duration::from_secs(90);
const SWAP_MIB: u64 = 384;

fn rounds_go_on(pair: &Pair, from: &str) -> Result<()> {
    let rounds = |pair: &Pair| -> Result<u64> {
        Ok(pair
            .replica(from, Role::Source)?
            .context("the source forgot its replica")?
            .progress
            .rounds)
    };
    let before = rounds(pair)?;
    wait_for("three more rounds", SOON, || {
        Ok((rounds(pair)? >= before + 3).then_some(()))
    })
}

/// The scrub reads pages back from swap to look at them, finds them whole, and the shadow keeps to its tier.
fn looked_at_in_swap(pair: &Pair, used: u64) -> Result<()> {
    let told = |pair: &Pair| {
        let replica = pair
            .replica("b", Role::Target)?
            .context("the target forgot its replica")?;
        Ok::<_, anyhow::Error>(replica.progress.resume)
    };
    let looked = wait_for("a thousand pages to be looked at in swap", SOON, || {
        Ok(Some(told(pair)?).filter(|r| r.scrubbed_swap_pages >= 1000))
    })?;
    println!("looked at in swap {looked:?}");
    ensure!(looked.differing_pages == 0, "they are what was sent: {looked:?}");
    wait_for("them to be pushed out again", SOON, || {
        Ok((pair.shadow("b").in_ram()? * 3 < used).then_some(()))
    })?;
    Ok(())
}

#[test]
fn a_cold_shadow_waits_in_swap_and_comes_back_whole() {
    let spec = VmSpec {
        dirty: 100,
        ..VmSpec::new("web", 10)
    };
    let settings = Settings {
        scrub_swap_s: Some(60),
        ..Settings::default()
    };
    with_pair_as("tiers", &spec, settings, |pair| {
        pair.protect("a", "b")?;
        pair.wait_standby("a")?;
        pair.shadow("b").order(Tier::Standby)?;
        if !swap::there() {
            let told = pair
                .shadow("b")
                .wait("the lack of swap to be told", |m| m.not_shrunk.is_some())?;
            let why = told.not_shrunk.unwrap_or_default();
            ensure!(why.contains("no swap"), "{why}");
            ensure!(
                told.resident_bytes * 10 > told.used_bytes * 9,
                "nothing was shrunk without it"
            );
        }
        if let Err(why) = pair.lab.swap(SWAP_MIB)? {
            println!("SKIPPED: this machine can have no swap: {why}");
            return Ok(());
        }
        let cold = pair.shadow("b").wait_shrunk()?;
        ensure!(cold.resident_bytes * 4 < cold.used_bytes, "{cold:?}");
        // Not only by its own word.
        wait_for("the kernel to say so", SOON, || {
            let seen = pair.shadow("b").in_ram()?;
            Ok((seen * 3 < cold.used_bytes).then_some(()))
        })?;
        looked_at_in_swap(pair, cold.used_bytes)?;
        // The guest writes on: what the rounds bring is swapped out in its turn.
        rounds_go_on(pair, "a")?;
        pair.shadow("b").order(Tier::Active)?;
        let warm = pair
            .shadow("b")
            .wait("the promotion", |m| m.promotion.is_some_and(|p| p.tier == Tier::Active))?;
        let promotion = warm.promotion.context("a promotion")?;
        println!("cold {cold:?}, warm {warm:?}");
        ensure!(warm.limit_bytes.is_none(), "tier 2 has no limit: {warm:?}");
        ensure!(
            warm.resident_bytes * 10 >= warm.used_bytes * 9 && promotion.read_bytes > 0,
            "all of it came back: {warm:?}"
        );
        rounds_go_on(pair, "a")?;
        pair.shadow("b").order(Tier::Standby)?;
        pair.shadow("b").wait_shrunk()?;
        // Straight from tier 0.
        let report = pair.switchover("a")?;
        println!(
            "guest stopped {:.1} ms, from tier 0",
            report.guest_stopped_us as f64 / 1e3
        );
        ensure!(pair.wait_runs()? == "b", "it runs on b");
        pair.verify()?;
        let back = pair.shadow("b").wait("all of the VM's RAM to be back", |m| {
            m.limit_bytes.is_none() && m.resident_bytes * 10 >= m.used_bytes * 9
        })?;
        println!("after the switchover {back:?}");
        Ok(())
    });
}
