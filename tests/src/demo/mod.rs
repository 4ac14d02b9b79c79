//! `cargo xtask demo`: the same load twice, on the plain machine and with Umbra.
//!
//! In reading order: [`plan`] (the load), [`scene`] (VMs, client, measurements), [`story`] (what the RPS tells meanwhile),
//! [`figures`] (both runs' numbers, bars, JSON), [`table`], [`say`].

pub mod figures;
pub mod plan;
pub mod say;
pub mod scene;
pub mod story;
pub mod table;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::lab::daemons::{self, Binaries, target_dir};
use crate::lab::vm::GuestImage;
use crate::lab::{self, Lab, sys};
use figures::{Figures, Plain, Protected};
use plan::Plan;
use say::say;
use scene::Scene;
use story::Story;

#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Where the figures go as JSON.
    pub json: Option<PathBuf>,
    /// Only the first half, to look at the load.
    pub plain_only: bool,
    /// Only the second half.
    pub umbra_only: bool,
}

/// Runs the demo. An error names what did not work or which bar was missed.
pub fn run(options: &Options) -> Result<()> {
    if let Some(reason) = lab::missing() {
        bail!("the demo cannot run here: {reason}");
    }
    let (plan, image) = (Plan::default(), GuestImage::find()?);
    let cores = sys::online_cpus().context("reading which CPUs are online")?;
    if let [first, _] = cores.as_slice() {
        // No core is left for the client, the RPS and this program. In both runs they share host a's, which is the
        // busy one by design, so that the idle host is idle.
        sys::pin(&[*first]).context("keeping the demo on a core")?;
    }
    // Before the first half, not after it.
    let binaries = if options.plain_only {
        None
    } else {
        Some(Binaries::find(&daemons::ALL)?)
    };
    say!(
        "Two hosts of one core each, a web VM and a neighbour on host a, and a client who asks the web VM {} times a second.",
        plan.per_second
    );
    say!(
        "The neighbour's load, on each of its {} vCPUs: {}",
        plan.neighbour_vcpus,
        plan.words()
    );
    say!("");
    let plain = if options.umbra_only {
        Plain::default()
    } else {
        kept("plain", |lab| plain(lab, &plan, &image))?
    };
    let Some(binaries) = binaries else {
        say!("{}", table::plain(&plain));
        return Ok(());
    };
    say!("");
    let protected = kept("umbra", |lab| protected(lab, &plan, &image, &binaries))?;
    let figures = Figures::of(&plan, &plain, &protected);
    say!("");
    say!("{}", table::both(&figures));
    if let Some(path) = &options.json {
        let text = serde_json::to_string(&figures.json())? + "\n";
        std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    if options.umbra_only {
        return Ok(());
    }
    let missed = figures.missed();
    if !missed.is_empty() {
        bail!("missed: {}", missed.join("; "));
    }
    say!(
        "All bars are met: no pattern error, at most {} ms stopped, warm before contention, a quarter of the contended time or less.",
        figures::DOWNTIME_MS_MAX
    );
    Ok(())
}

/// Runs one half in a lab of its own. If it fails, its logs outlive it.
fn kept<T>(name: &str, half: impl FnOnce(&Lab) -> Result<T>) -> Result<T> {
    let lab = Lab::new(&["a", "b"])?;
    half(&lab).map_err(|e| match logs(&lab, name) {
        Ok(dir) => e.context(format!("the {name} half failed; its logs are in {}", dir.display())),
        Err(lost) => e.context(format!(
            "the {name} half failed, and its logs could not be kept: {lost:#}"
        )),
    })
}

fn logs(lab: &Lab, name: &str) -> Result<PathBuf> {
    let dir: &Path = &target_dir()?.join("demo-logs").join(name);
    lab.keep_logs(dir)
}

fn plain(lab: &Lab, plan: &Plan, image: &GuestImage) -> Result<Plain> {
    say::head("1. Without Umbra");
    let mut scene = Scene::raise(lab, plan, image)?;
    scene.begin(plan)?;
    while scene.elapsed_s() < plan.window_s {
        scene.tick(None)?;
    }
    scene.plain(plan)
}

fn protected(lab: &Lab, plan: &Plan, image: &GuestImage, binaries: &Binaries) -> Result<Protected> {
    say::head("2. With Umbra");
    let mut scene = Scene::raise(lab, plan, image)?;
    let mut daemons = vec![binaries.start_rps(&lab.control, &lab.hosts, &plan.policy())?];
    for host in &lab.hosts {
        daemons.push(binaries.start_replicator(host)?);
        daemons.push(binaries.start_agent(host, &lab.control)?);
    }
    say!("Umbra is up: one RPS, an agent and a replicator on each host.");
    let mut story = Story::new(lab, scene.web_id());
    scene.begin(plan)?;
    story.begin(scene.start());
    loop {
        for d in &mut daemons {
            d.check()?;
        }
        story.poll()?;
        scene.tick(Some(&story))?;
        let enough = story.is_home() && scene.elapsed_s() > plan.window_s;
        if enough || scene.elapsed_s() > plan.patience_s {
            break;
        }
    }
    story.finish(&mut scene, plan)
}
