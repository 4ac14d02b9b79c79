//! What can go wrong, and the exit code that says so to a script.

use umbra_api::problem::Problem;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The RPS answered with a problem document.
    #[error("{}", told(.0))]
    Refused(Problem),
    /// No VM of that name. `known` is how many there are, `near` the names that look alike.
    #[error("no VM is called '{name}'{}", hint(near, *known))]
    NoSuchVm {
        name: String,
        near: Vec<String>,
        known: usize,
    },
    #[error("{count} VMs are called '{name}': name one by its UUID:\n  {}", ids.join("\n  "))]
    Ambiguous {
        name: String,
        count: usize,
        ids: Vec<String>,
    },
    #[error("the RPS at {url} cannot be reached: {cause}{}", unsure(*sent))]
    Unreachable { url: String, cause: String, sent: bool },
    #[error("what answers at {url} is no Umbra RPS, or one of another version: {cause}")]
    Foreign { url: String, cause: String },
    /// A step of a recovery was refused; what was done before it.
    #[error("{step}: {cause}{}", so_far(done))]
    Step {
        step: String,
        cause: Box<Error>,
        done: Vec<String>,
    },
    /// The report of a VM that can't be shadowed.
    #[error("{0}")]
    NotAdoptable(String),
    #[error(transparent)]
    Pki(#[from] crate::pki::PkiError),
    #[error("cannot start: {0}")]
    Local(#[from] std::io::Error),
}

/// Title and detail, or the detail alone where it begins with the title's words.
fn told(p: &Problem) -> String {
    match p.detail.to_lowercase().starts_with(&p.title.to_lowercase()) {
        true => p.detail.clone(),
        false => p.to_string(),
    }
}

/// Done steps stay done.
fn so_far(done: &[String]) -> String {
    match done {
        [] => String::new(),
        done => format!("\nDone before that:\n  {}", done.join("\n  ")),
    }
}

/// A request that changes something may have had its effect although no answer came.
fn unsure(sent: bool) -> &'static str {
    if sent {
        "\nIt may have taken the request before that: look with 'umbra events' before you repeat it"
    } else {
        ""
    }
}

fn hint(near: &[String], known: usize) -> String {
    match near {
        [] if known == 0 => "; the RPS knows of no VM yet (does an agent report to it?)".to_owned(),
        [] => ". 'umbra vm list' names them all".to_owned(),
        [one] => format!(". Did you mean '{one}'?"),
        [init @ .., last] => format!(". Did you mean '{}' or '{last}'?", init.join("', '")),
    }
}

impl Error {
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Refused(p) => match p.status {
                404 => 3,
                409 => 4,
                _ => 1,
            },
            Self::NoSuchVm { .. } => 3,
            Self::Ambiguous { .. } => 2,
            Self::Unreachable { .. } => 5,
            Self::Step { cause, .. } => cause.exit_code(),
            Self::NotAdoptable(_) => 4,
            Self::Foreign { .. } | Self::Pki(_) | Self::Local(_) => 1,
        }
    }

    /// The same for programs. A status of 0 says that no HTTP answer stands behind it.
    pub fn problem(&self) -> Problem {
        let (code, title) = match self {
            Self::Refused(p) => return p.clone(),
            Self::NoSuchVm { .. } => ("no_such_vm", "No such VM"),
            Self::Ambiguous { .. } => ("ambiguous_vm", "The name fits several VMs"),
            Self::Unreachable { .. } => ("rps_unreachable", "The RPS cannot be reached"),
            Self::Foreign { .. } => ("foreign_answer", "Not understood"),
            Self::NotAdoptable(_) => ("not_adoptable", "The VM can't be shadowed"),
            Self::Step { .. } => ("step", "A step of the recovery was refused"),
            Self::Pki(_) => ("pki", "No certificate was made"),
            Self::Local(_) => ("local", "This machine"),
        };
        Problem::new(0, code, title, self.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_map_to_codes_that_scripts_can_tell_apart() {
        let of = |status| Error::Refused(Problem::new(status, "c", "t", "d")).exit_code();
        assert_eq!(
            [of(404), of(409), of(400), of(422), of(500), of(502)],
            [3, 4, 1, 1, 1, 1]
        );
        let e = Error::Unreachable {
            url: "http://x".into(),
            cause: "refused".into(),
            sent: false,
        };
        assert_eq!(e.exit_code(), 5);
    }

    #[test]
    fn hints_read_well() {
        let e = |near: &[&str], known| {
            let near = near.iter().map(|s| (*s).to_owned()).collect();
            Error::NoSuchVm {
                name: "wep".into(),
                near,
                known,
            }
            .to_string()
        };
        assert_eq!(e(&["web"], 3), "no VM is called 'wep'. Did you mean 'web'?");
        assert_eq!(
            e(&["web", "wet"], 3),
            "no VM is called 'wep'. Did you mean 'web' or 'wet'?"
        );
        assert!(e(&[], 3).ends_with("'umbra vm list' names them all"));
        assert!(e(&[], 0).contains("no VM yet"));
    }

    #[test]
    fn a_problem_keeps_its_code_and_its_words() {
        let p = Problem::new(409, "wrong_stage", "Not now", "web has no shadow");
        assert_eq!(Error::Refused(p.clone()).problem(), p);
        assert_eq!(Error::Refused(p).to_string(), "Not now: web has no shadow");
        let twice = Problem::new(409, "no_target", "No host", "no host can hold it");
        assert_eq!(Error::Refused(twice).to_string(), "no host can hold it");
    }
}
