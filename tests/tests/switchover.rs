//! A running VM goes to another host and comes back, on real QEMUs: nothing of its memory is lost, and it never runs twice.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use umbra_api::order::{Order, OrderKind, Pacing};
use umbra_api::replica::{Phase, Role, SwitchoverReport};
use umbra_api::{Epoch, OrderId, VmId};
use umbra_tests::lab::client::{Client, Quality};
use umbra_tests::lab::copies::{switchovers_ms, wall_us};
use umbra_tests::lab::pair::{Pair, with_pair};
use umbra_tests::lab::process::wait_for;
use umbra_tests::lab::udp::UdpProber;
use umbra_tests::lab::vm::{self, Console, VmSpec};

fn busy() -> VmSpec {
    VmSpec {
        dirty: 1000,
        work_us: 2000,
        ..VmSpec::new("web", 10)
    }
}

/// One way, with a web client and a UDP prober at it all the time.
fn go(pair: &mut Pair, from: &str, to: &str) -> Result<SwitchoverReport> {
    let before = vm::stats(&pair.lab.client, pair.vm.spec.ip)?;
    pair.protect(from, to)?;
    let warm = pair.wait_standby(from)?;
    ensure!(
        warm.progress.seed_ms.is_some(),
        "a warm shadow knows how long its seed took: {warm:?}"
    );
    // Rounds go on: the shadow follows a guest that writes.
    wait_for("two more rounds", Duration::from_secs(60), || {
        let now = pair
            .replica(from, Role::Source)?
            .context("the source forgot its replica")?;
        Ok((now.progress.rounds >= warm.progress.rounds + 2).then_some(()))
    })?;
    ensure!(pair.wait_runs()? == from, "before the switchover it runs on {from}");
    let start_us = wall_us();
    let report = pair.switchover(from)?;
    ensure!(pair.wait_runs()? == to, "after the switchover it runs on {to}");
    // The guest runs before the target has written down that it does, and its phase is told after that.
    wait_for("the target's replica to be active", Duration::from_secs(30), || {
        let target = pair.replica(to, Role::Target)?.context("the target knows the VM")?;
        Ok((target.phase == Phase::Active).then_some(()))
    })?;
    let after = vm::stats(&pair.lab.client, pair.vm.spec.ip)?;
    ensure!(
        after.counter > before.counter,
        "the guest's counter went on: {before:?} {after:?}"
    );
    ensure!(pair.errors()? == 0, "no pattern error");
    // Each copy's events are read when the watcher comes to it.
    let watched = wait_for("the watcher to see the switchover", Duration::from_secs(30), || {
        let mut turns = pair.copies.turns();
        turns.retain(|t| t.at_us >= start_us);
        Ok(Some(switchovers_ms(&turns)).filter(|w| !w.is_empty()))
    })?;
    println!(
        "{from} to {to}: seed {} ms, {} bytes sent, guest stopped {:.1} ms (reported), {watched:.1?} ms (watched), order to running {:.1} ms",
        warm.progress.seed_ms.unwrap_or(0),
        report.wire_bytes,
        report.guest_stopped_us as f64 / 1e3,
        report.order_to_told_us as f64 / 1e3
    );
    ensure!(
        watched.len() == 1,
        "one STOP here and one RESUME there, not {watched:?}"
    );
    ensure!(
        report.guest_stopped_us > 0 && report.wire_bytes > 0,
        "the report has figures: {report:?}"
    );
    Ok(report)
}

#[test]
fn there_and_back_under_load() {
    with_pair("there_and_back", &busy(), |pair| {
        let start = std::time::Instant::now();
        let ns = pair.lab.client.ns.clone();
        let client = Client::start(&ns, pair.vm.spec.ip, 20, true)?;
        let prober = UdpProber::start(&ns, pair.vm.spec.ip, Duration::from_millis(2))?;
        go(pair, "a", "b")?;
        println!("UDP probes each 2 ms: {:?}", prober.finish());
        // The stopped primary is kept as the way back until it is retired.
        ensure!(
            vm::qemus(pair.host("a")?, pair.id()).len() == 1,
            "the old primary is still there"
        );
        pair.retire("a")?;
        pair.verify()?;
        go(pair, "b", "a")?;
        pair.retire("b")?;
        pair.verify()?;
        ensure!(
            pair.ram_files("b")?.is_empty(),
            "RAM files were left on b: {:?}",
            pair.ram_files("b")?
        );
        let (failed, why) = client.errors();
        ensure!(failed == 0, "{failed} requests had no answer: {why:?}");
        println!(
            "client: {:?}",
            Quality::of(&client.answers(), start, std::time::Instant::now())
        );
        ensure!(
            Console::read(&pair.vm.serial).errors == 0,
            "the first console told of errors"
        );
        Ok(())
    });
}

#[test]
fn a_released_vm_is_as_it_was() {
    with_pair("release", &busy(), |pair| {
        for _ in 0..2 {
            pair.protect("a", "b")?;
            pair.wait_standby("a")?;
            ensure!(!pair.ram_files("b")?.is_empty(), "a shadow's RAM is a file");
            pair.release()?;
            pair.wait_alone()?;
            ensure!(pair.wait_runs()? == "a", "it runs where it ran");
            wait_for("the shadow's files to be gone", Duration::from_secs(60), || {
                Ok(pair.ram_files("b")?.is_empty().then_some(()))
            })?;
        }
        // Released while the first copy is under way.
        pair.protect("a", "b")?;
        pair.release()?;
        pair.wait_alone()?;
        ensure!(pair.wait_runs()? == "a", "it runs where it ran");
        let status = pair.vm.watch();
        ensure!(
            status.is_err(),
            "the watcher holds the second QMP socket, so a third client must wait"
        );
        pair.verify()
    });
}

#[test]
fn orders_that_make_no_sense_are_refused_by_name() {
    with_pair("refusals", &busy(), |pair| {
        let a = pair.replicator("a")?;
        let code = |vm: VmId, epoch: u64, kind: OrderKind| -> Result<String> {
            Ok(a.order(vm, Epoch(epoch), kind)?
                .err()
                .map_or_else(|| "accepted".to_owned(), |p| p.code))
        };
        let protect = |link: &str| -> Result<OrderKind> {
            Ok(OrderKind::Protect {
                target: "b".parse()?,
                link: link.into(),
                pacing: Pacing::default(),
            })
        };
        let id = pair.id();
        let stranger = VmId(uuid::Uuid::from_u128(77));
        ensure!(code(stranger, 1, protect("10.77.0.2:7402")?)? == "no_such_vm");
        ensure!(code(id, 1, OrderKind::Switchover)? == "wrong_phase");
        ensure!(code(id, 1, protect("nonsense")?)? == "bad_order");
        let lazy = OrderKind::Protect {
            target: "b".parse()?,
            link: "10.77.0.2:7402".into(),
            pacing: Pacing {
                round_ms: 60_000,
                ..Pacing::default()
            },
        };
        ensure!(code(id, 1, lazy)? == "bad_order");
        let reply = pair
            .host("a")?
            .post((pair.host("a")?.ip, 7403), "/v1/orders", "{\"id\": 1}")?;
        ensure!(reply.status == 400, "half an order: HTTP {}", reply.status);

        pair.protect("a", "b")?;
        pair.wait_standby("a")?;
        let epoch = pair.epoch();
        let a = pair.replicator("a")?;
        let stale = a.order(id, Epoch(epoch.0 - 1), OrderKind::Switchover)?;
        ensure!(stale.as_ref().is_err_and(|p| p.code == "stale_epoch"), "{stale:?}");
        // The same order again changes nothing.
        let order = Order {
            id: OrderId(uuid::Uuid::new_v4()),
            vm: id,
            epoch: epoch.next(),
            kind: OrderKind::Switchover,
        };
        for _ in 0..3 {
            a.send(&order)?.map_err(anyhow::Error::from)?;
        }
        wait_for("the VM to run on b", Duration::from_secs(60), || {
            Ok((pair.running_on() == ["b"]).then_some(()))
        })?;
        a.send(&order)?.map_err(anyhow::Error::from)?;
        ensure!(pair.wait_runs()? == "b", "an order that was sent again does nothing");
        ensure!(pair.errors()? == 0, "no pattern error");
        Ok(())
    });
}
