//! Who is on stage in both runs, and what is measured about them.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use umbra_api::VmId;

use super::figures::{Bill, Plain};
use super::plan::Plan;
use super::say;
use super::story::Story;
use crate::lab::Lab;
use crate::lab::client::{Client, Quality};
use crate::lab::copies::{Copies, Turn};
use crate::lab::host::Host;
use crate::lab::vm::{self, Console, GuestImage, Vm, VmSpec};

/// A second counts as contended if the VM waited longer than this in it: the RPS is told the same limit. On a host of one
/// core QEMU's own threads wait for each other for 100 ms a second without any neighbour, for 200 beside one that takes
/// a third of it, and for 500 when two threads of the neighbour want all of it.
pub const CONTENDED_MS: f64 = 300.0;
/// How often the state is printed.
const TOLD_EVERY_S: f64 = 5.0;
const TICK: Duration = Duration::from_millis(250);

pub struct Scene<'a> {
    lab: &'a Lab,
    web: Vm,
    neighbour: Vm,
    client: Client,
    pub copies: Copies,
    start: Instant,
    told_s: f64,
}

impl<'a> Scene<'a> {
    /// Boots both VMs on host a, and lets the client begin.
    pub fn raise(lab: &'a Lab, plan: &Plan, image: &GuestImage) -> Result<Self> {
        let a = lab.host("a")?;
        let mut web = VmSpec::new("web", 10);
        (web.dirty, web.work_us) = (plan.dirty, plan.work_us);
        let mut neighbour = VmSpec::new("neighbour", 11);
        // Little to verify: its load is the schedule's.
        (neighbour.dirty, neighbour.pattern_mib) = (50, Some(16));
        neighbour.vcpus = plan.neighbour_vcpus;
        // One after the other: the guest calibrates its work at boot, which wants a core of its own.
        let mut web = Vm::start(a, image, &web)?;
        web.wait_up(&lab.client)?;
        let mut neighbour = Vm::start(a, image, &neighbour)?;
        neighbour.wait_up(&lab.client)?;
        say!(
            "The web VM ({}) and the neighbour ({}) are up on host a.",
            web.spec.ip,
            neighbour.spec.ip
        );
        let copies = Copies::watch(&lab.hosts, web.spec.id)?;
        let client = Client::start(&lab.client.ns, web.spec.ip, plan.per_second, true)?;
        let scene = Self {
            lab,
            web,
            neighbour,
            client,
            copies,
            start: Instant::now(),
            told_s: 0.0,
        };
        scene.burn(&format!("0:{}", plan.neighbour.first().map_or(0.0, |p| p.1)))?;
        Ok(scene)
    }

    /// The schedule begins now: second 0 of everything that is told.
    pub fn begin(&mut self, plan: &Plan) -> Result<()> {
        self.burn(&plan.burn())?;
        self.start = Instant::now();
        Ok(())
    }

    fn burn(&self, schedule: &str) -> Result<()> {
        let to = (self.neighbour.spec.ip, vm::HTTP);
        self.lab
            .client
            .post(to, "/burn", schedule)?
            .ok()
            .context("setting the neighbour's load")?;
        Ok(())
    }

    pub fn web_id(&self) -> VmId {
        self.web.spec.id
    }

    pub fn start(&self) -> Instant {
        self.start
    }

    pub fn elapsed_s(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }

    /// Lets a moment pass, and tells now and then how things stand.
    pub fn tick(&mut self, story: Option<&Story<'_>>) -> Result<()> {
        std::thread::sleep(TICK);
        self.neighbour.process.check()?;
        if story.is_none() {
            self.web.process.check()?;
        }
        if let Some(double) = self.copies.doubles().first() {
            bail!("two copies of the web VM ran at once: {double}");
        }
        if self.elapsed_s() >= self.told_s + TOLD_EVERY_S {
            self.told_s += TOLD_EVERY_S;
            say!("{}", say::dim(&self.words(story)));
            if let Some(why) = story.map(Story::hesitation).transpose()?.flatten() {
                say!("          {}", say::dim(&format!("Umbra: {why}")));
            }
        }
        Ok(())
    }

    fn words(&self, story: Option<&Story<'_>>) -> String {
        let seconds = self.elapsed_s() as usize;
        let waits = self.copies.waits_ms(self.start, seconds);
        let recent = waits
            .get(seconds.saturating_sub(TOLD_EVERY_S as usize)..)
            .unwrap_or_default();
        let wait = recent.iter().sum::<f64>() / recent.len().max(1) as f64;
        let now = Instant::now();
        let client = Quality::of(&self.client.answers(), now - Duration::from_secs(5), now);
        let rest = story.map(|s| s.standing()).unwrap_or_default();
        format!(
            "  {seconds:>4} s  web waits {wait:>4.0} ms/s for a CPU, answers within {:>4.0} ms (p99){rest}",
            client.p99_ms
        )
    }

    /// Seconds, from the start on, and how long the running copy waited in each.
    pub fn waits_ms(&self, seconds: f64) -> Vec<f64> {
        self.copies.waits_ms(self.start, seconds as usize)
    }

    /// What the client saw and the VM waited for, over the plan's window.
    pub fn bill(&self, plan: &Plan) -> Bill {
        let answers = self.client.answers();
        let end = self.start + Duration::from_secs_f64(plan.window_s);
        let all = Quality::of(&answers, self.start, Instant::now().max(end));
        let window = Quality::of(&answers, self.start, end);
        let waits_ms = self.waits_ms(self.elapsed_s().max(plan.window_s));
        let (failed, last_error) = self.client.errors();
        Bill {
            window,
            gap_ms: all.gap_ms,
            waits_ms,
            failed,
            last_error,
        }
    }

    pub fn plain(&mut self, plan: &Plan) -> Result<Plain> {
        let errors = self.pattern_errors(&[])?;
        Ok(Plain {
            bill: self.bill(plan),
            errors,
        })
    }

    /// Errors that both guests count, and that their consoles told; `consoles` are those of other copies of the web VM.
    pub fn pattern_errors(&self, consoles: &[std::path::PathBuf]) -> Result<u64> {
        let mut errors = 0;
        for guest in [&self.web, &self.neighbour] {
            let stats = vm::stats(&self.lab.client, guest.spec.ip).context("asking a guest for its pattern errors")?;
            errors += stats.errors.max(Console::read(&guest.serial).errors);
        }
        Ok(errors + consoles.iter().map(|c| Console::read(c).errors).max().unwrap_or(0))
    }

    /// Waits until the guest has verified each page of its pattern once more.
    pub fn verify(&self, within: Duration) -> Result<()> {
        vm::wait_scrubbed(&self.lab.client, self.web.spec.ip, within)
    }

    pub fn turns(&self) -> Vec<Turn> {
        self.copies.turns()
    }

    pub fn hosts(&self) -> &[Host] {
        &self.lab.hosts
    }
}
