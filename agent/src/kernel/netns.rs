//! Interfaces by name in another network namespace. A thread of its own enters the namespace, so that no other thread of the agent
//! ever stands in a foreign one.

use std::fs::File;
use std::path::Path;

use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, setns};

/// In this process's own namespace.
pub fn ifindexes(names: &[String]) -> Vec<(String, u32)> {
    let found = names
        .iter()
        .filter_map(|n| Some((n.clone(), if_nametoindex(n.as_str()).ok()?)));
    found.collect()
}

/// In the namespace behind `path` (`/proc/PID/ns/net`). Entering needs CAP_SYS_ADMIN.
pub fn ifindexes_in(path: &Path, names: &[String]) -> std::io::Result<Vec<(String, u32)>> {
    let ns = File::open(path)?;
    let work = || -> std::io::Result<_> {
        setns(&ns, CloneFlags::CLONE_NEWNET)?;
        Ok(ifindexes(names))
    };
    std::thread::scope(|s| {
        let entered = std::thread::Builder::new().name("netns".into()).spawn_scoped(s, work)?;
        entered
            .join()
            .unwrap_or_else(|_| Err(std::io::Error::other("the thread in the namespace panicked")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_there_and_others_are_left_out() {
        let names = ["lo".to_owned(), "no-such-device".to_owned(), String::new()];
        assert_eq!(ifindexes(&names), [("lo".to_owned(), 1)]);
        assert!(ifindexes_in(Path::new("/nonexistent"), &names).is_err());
    }
}
