//! The tasks of a running RPS: one that plans, one a host that polls, one an order that is out, and the server.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::net::TcpListener;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use umbra_api::HostId;
use umbra_api::order::Order;
use umbra_daemon::http::{self, Limits};
use umbra_daemon::stop::{Stop, notify_ready};

use super::metrics::OrderLabel;
use super::{Service, lock, wall_clock};
use crate::orchestrator::Input;
use crate::orchestrator::orders::Answer;

/// How often old rows are looked for.
const PRUNE: Duration = Duration::from_secs(3600);

/// Largest body: a batch of samples of the most VMs that one may carry.
const BODY_MAX: usize = 8 << 20;

/// Serves until the stop. Nothing is undone at the end: shadows and holds are the replicators', a restart resumes.
pub async fn run(service: Arc<Service>, listener: TcpListener, stop: Stop) -> anyhow::Result<()> {
    let mut tasks = tokio::task::JoinSet::new();
    for host in service.config.hosts.iter().map(|h| h.name.clone()) {
        tasks.spawn(poll(service.clone(), host, stop.clone()));
    }
    tasks.spawn(plan(service.clone(), stop.clone()));
    tasks.spawn(prune(service.clone(), stop.clone()));
    let limits = Limits {
        body_bytes: BODY_MAX,
        timeout: Duration::from_secs(30),
    };
    let answering = service.clone();
    let handler = move |request| {
        let service = answering.clone();
        async move { crate::http::answer(service, request).await }
    };
    notify_ready();
    let broken = tokio::select! {
        () = http::serve(listener, limits, stop.clone(), handler) => false,
        () = service.broken.notified() => true,
    };
    if broken {
        tasks.abort_all();
        let failed = lock(&service.engine).failed.take();
        return match failed {
            Some(e) => Err(e).context("nothing can be decided without the store"),
            None => Ok(()),
        };
    }
    while tasks.join_next().await.is_some() {}
    Ok(())
}

/// Sends one order and takes its answer in.
pub(super) fn send(service: Arc<Service>, to: HostId, order: Order) {
    tokio::spawn(async move {
        let answer = service.replicators.order(&to, &order).await;
        let (kind, epoch, vm) = (order.kind.name(), order.epoch, order.vm);
        let word = match &answer {
            Answer::Accepted => "accepted",
            Answer::Refused(_) => "refused",
            Answer::Unknown(_) => "unknown",
        };
        match &answer {
            Answer::Accepted => tracing::debug!(%vm, %epoch, "{to} accepted {kind}"),
            Answer::Refused(r) => tracing::warn!(%vm, %epoch, "{to} refused {kind}: {r}"),
            Answer::Unknown(why) => tracing::warn!(%vm, %epoch, "{kind}: {why}"),
        }
        service
            .metrics
            .orders
            .get_or_create(&OrderLabel {
                order: kind,
                answer: word,
            })
            .inc();
        let answered = !matches!(answer, Answer::Unknown(_));
        // A failed store is told by `broken`.
        let _ = service.step(Input::Answered {
            order: order.id,
            answer,
        });
        if answered {
            service.hurry.notify_waiters();
        }
    });
}

/// Asks one host's replicator for its replicas, again and again.
async fn poll(service: Arc<Service>, host: HostId, mut stop: Stop) {
    let orders = service.config.orders;
    let mut told_down = false;
    loop {
        let asked_at = wall_clock();
        let replicas = tokio::select! {
            r = service.replicators.replicas(&host) => r,
            () = stop.asked() => return,
        };
        match &replicas {
            Err(e) if !told_down => tracing::warn!(%host, "its replicator does not answer: {e}"),
            Ok(_) if told_down => tracing::info!(%host, "its replicator answers again"),
            _ => {}
        }
        told_down = replicas.is_err();
        if service
            .step(Input::Polled {
                host: host.clone(),
                asked_at,
                replicas,
            })
            .is_err()
        {
            return;
        }
        let hurried = lock(&service.engine).core.hurried();
        let pause_ms = if hurried {
            orders.fast_poll_ms.min(orders.poll_ms)
        } else {
            orders.poll_ms
        };
        tokio::select! {
            () = sleep(Duration::from_millis(pause_ms)) => {}
            () = service.hurry.notified() => {}
            () = stop.asked() => return,
        }
    }
}

/// A new outlook each slot; between them, decisions that only wait for their time.
async fn plan(service: Arc<Service>, mut stop: Stop) {
    let slot = Duration::from_millis(service.config.slot_ms);
    let mut ticks = interval(slot.min(Duration::from_secs(1)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut due = Instant::now();
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            // An edge may make the next decision possible at once.
            () = service.hurry.notified() => {}
            () = stop.asked() => return,
        }
        let done = match Instant::now() >= due {
            true => {
                due = Instant::now() + until_next_slot(service.config.slot_ms);
                look_ahead(&service).await
            }
            false => service.plan(),
        };
        if done.is_err() || service.step(Input::Tick).is_err() {
            return;
        }
    }
}

/// A slot's last samples come a little after its end: agents tell once a second or so.
fn until_next_slot(slot_ms: u64) -> Duration {
    let slot = i64::try_from(slot_ms).unwrap_or(i64::MAX).max(1);
    let into = wall_clock().0.rem_euclid(slot);
    let grace = (slot / 5).min(1_500);
    let left = if into < grace {
        grace - into
    } else {
        slot - into + grace
    };
    Duration::from_millis(u64::try_from(left).unwrap_or(1))
}

async fn look_ahead(service: &Arc<Service>) -> Result<(), ()> {
    let ahead = service.clone();
    match tokio::task::spawn_blocking(move || ahead.foresee()).await {
        Ok(outlook) => service.take_outlook(outlook),
        Err(e) => {
            // A forecast that panics must not end the rest; the next slot tries again.
            tracing::error!("no outlook: {e}");
            Ok(())
        }
    }
}

async fn prune(service: Arc<Service>, mut stop: Stop) {
    loop {
        if service.prune().is_err() || timeout(PRUNE, stop.asked()).await.is_ok() {
            return;
        }
    }
}
