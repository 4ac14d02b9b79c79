//! A command: ask the RPS, then print its JSON or draw it. Each returns the text for standard output.

use std::path::Path;

use umbra_api::view::{DecisionView, LifecycleEvent, ModeRequest, ShadowRequest, StatusView, VmSummary, VmView};
use umbra_daemon::http::Method;

use crate::args::{Args, Command, ModeArg, PkiCommand, ShadowCommand, Since, VmCommand};
use crate::doctor;
use crate::error::Error;
use crate::pki;
use crate::recover;
use crate::render::{self, Look};
use crate::rps::Rps;

/// Text for standard output, and whether what was asked for is so.
pub struct Answer {
    pub text: String,
    pub good: bool,
}

impl From<String> for Answer {
    fn from(text: String) -> Self {
        Self { text, good: true }
    }
}

pub async fn run(args: &Args, look: &Look) -> Result<Answer, Error> {
    match &args.command {
        Command::Pki(command) => make(command, args.json).map(Answer::from),
        Command::Doctor { ram_dir } => Ok(examine(ram_dir, args.json, look)),
        command => ask(args, command, look).await.map(Answer::from),
    }
}

/// This host, as it is.
fn examine(ram_dir: &Path, json: bool, look: &Look) -> Answer {
    let checks = doctor::all(&doctor::Facts::read(ram_dir));
    let text = match json {
        true => serde_json::to_string(&checks).unwrap_or_default(),
        false => look.pairs(doctor::rows(&checks)),
    };
    Answer {
        text,
        good: doctor::fit(&checks),
    }
}

async fn ask(args: &Args, command: &Command, look: &Look) -> Result<String, Error> {
    let rps = Rps::new(&args.rps, args.timeout)?;
    let ask = Ask {
        rps: &rps,
        json: args.json,
        timeout: args.timeout,
        look,
    };
    match command {
        Command::Status => ask.status().await,
        Command::Vm(VmCommand::List) => ask.vm_list().await,
        Command::Vm(VmCommand::Show { vm }) => ask.vm_show(vm).await,
        Command::Explain { vm } => ask.explain(vm).await,
        Command::Shadow(s) => ask.shadow(s).await,
        Command::Mode { mode } => ask.mode(*mode).await,
        Command::Events { vm, since, limit } => ask.events(vm.as_deref(), *since, *limit).await,
        Command::Decisions { vm, limit } => ask.decisions(vm.as_deref(), *limit).await,
        Command::Adopt(a) => recover::adopt(&ask, a).await,
        Command::Recover(r) => recover::recover(&ask, r).await,
        // Answered before anybody is asked.
        Command::Pki(_) | Command::Doctor { .. } => Ok(String::new()),
    }
}

/// Certificates, on this machine.
fn make(command: &PkiCommand, json: bool) -> Result<String, Error> {
    let now = jiff::Timestamp::now();
    let (made, rest) = match command {
        PkiCommand::Init { dir } => (
            pki::init(dir, now)?,
            "The key stays here. The certificate goes to every host, as link.tls.ca.".to_owned(),
        ),
        PkiCommand::Issue { dir, host, days } => (
            pki::issue(dir, host, *days, now)?,
            format!("Both go to {host}, as link.tls.cert and link.tls.key; valid for {days} days."),
        ),
    };
    match json {
        true => Ok(serde_json::to_string(&made).unwrap_or_default()),
        false => Ok(format!("{}\n{}\n{rest}", made.cert.display(), made.key.display())),
    }
}

pub struct Ask<'a> {
    pub rps: &'a Rps,
    pub json: bool,
    pub timeout: std::time::Duration,
    look: &'a Look,
}

impl Ask<'_> {
    async fn status(&self) -> Result<String, Error> {
        let text = self.rps.get("/v1/status").await?;
        if self.json {
            return Ok(text);
        }
        let view: StatusView = self.rps.view(&text)?;
        Ok(render::status::status(self.look, self.rps.base(), &view))
    }

    async fn vm_list(&self) -> Result<String, Error> {
        let text = self.rps.get("/v1/vms").await?;
        if self.json {
            return Ok(text);
        }
        let vms: Vec<VmSummary> = self.rps.view(&text)?;
        Ok(render::vms::list(self.look, &vms))
    }

    async fn vm_show(&self, vm: &str) -> Result<String, Error> {
        let id = self.rps.vm_id(vm).await?;
        let text = self.rps.get(&format!("/v1/vms/{id}")).await?;
        if self.json {
            return Ok(text);
        }
        let view: VmView = self.rps.view(&text)?;
        Ok(render::vm::show(self.look, &view))
    }

    async fn explain(&self, vm: &str) -> Result<String, Error> {
        let id = self.rps.vm_id(vm).await?;
        let text = self.rps.get(&format!("/v1/vms/{id}/explain")).await?;
        if self.json {
            return Ok(text);
        }
        let decision: DecisionView = self.rps.view(&text)?;
        // The decision names the VM by its id only: name and host are its present ones.
        let vms = self.rps.vms().await?;
        let summary = vms.iter().find(|v| v.vm == id);
        Ok(render::explain::explain(self.look, &decision, summary))
    }

    async fn shadow(&self, command: &ShadowCommand) -> Result<String, Error> {
        let (vm, request) = match command {
            ShadowCommand::Handover { vm, replicator } => return recover::hand_over(self, vm, replicator).await,
            ShadowCommand::Create { vm, host } => (vm, ShadowRequest::Create { host: host.clone() }),
            ShadowCommand::Switchover { vm } => (vm, ShadowRequest::Switchover),
            ShadowCommand::Failback { vm } => (vm, ShadowRequest::Failback),
            ShadowCommand::Release { vm } => (vm, ShadowRequest::Release),
        };
        let id = self.rps.vm_id(vm).await?;
        let text = self
            .rps
            .send(Method::POST, &format!("/v1/vms/{id}/shadow"), &request)
            .await?;
        match self.json {
            true => Ok(text),
            false => Ok(render::accepted(vm, &request)),
        }
    }

    async fn mode(&self, wanted: Option<ModeArg>) -> Result<String, Error> {
        let text = match wanted {
            None => self.rps.get("/v1/mode").await?,
            Some(m) => {
                self.rps
                    .send(Method::PUT, "/v1/mode", &ModeRequest { mode: m.into() })
                    .await?
            }
        };
        if self.json {
            return Ok(text);
        }
        let view: ModeRequest = self.rps.view(&text)?;
        Ok(render::mode(view.mode))
    }

    async fn events(&self, vm: Option<&str>, since: Option<Since>, limit: u32) -> Result<String, Error> {
        let mut path = format!("/v1/events?limit={limit}");
        if let Some(vm) = vm {
            path += &format!("&vm={}", self.rps.vm_id(vm).await?);
        }
        if let Some(s) = since {
            path += &format!("&since={}", s.resolve(self.look.now).0);
        }
        let text = self.rps.get(&path).await?;
        if self.json {
            return Ok(text);
        }
        let events: Vec<LifecycleEvent> = self.rps.view(&text)?;
        Ok(render::events::events(self.look, &events, &self.rps.vms().await?))
    }

    async fn decisions(&self, vm: Option<&str>, limit: u32) -> Result<String, Error> {
        let mut path = format!("/v1/decisions?limit={limit}");
        if let Some(vm) = vm {
            path += &format!("&vm={}", self.rps.vm_id(vm).await?);
        }
        let text = self.rps.get(&path).await?;
        if self.json {
            return Ok(text);
        }
        let decisions: Vec<DecisionView> = self.rps.view(&text)?;
        Ok(render::events::decisions(self.look, &decisions, &self.rps.vms().await?))
    }
}
