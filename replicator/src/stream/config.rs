//! The configuration section: the machine's name, and subsections that say how the stream is made.
//!
//! ```text
//! section      07   name_len be32   name   subsection…
//! subsection   05   id_len u8   id   version be32   fields
//! fields       configuration/capabilities      count be32   count × (len u8, name)
//!              configuration/target-page-bits  bits be32
//!              configuration/uuid              uuid[16]
//! ```
//! The section carries no length: whoever does not know a subsection cannot find what follows it.

use super::StreamError;
use super::items::{Fields, PAGE_BITS, Step, Stop, section, show, step};

const CAPABILITIES: &[u8] = b"configuration/capabilities";
const PAGE_BITS_ID: &[u8] = b"configuration/target-page-bits";
const UUID: &[u8] = b"configuration/uuid";

/// The capability that makes QEMU leave shared RAM out of the stream.
pub const IGNORE_SHARED: &[u8] = b"x-ignore-shared";

/// Capabilities that QEMU lists in the stream and that change what it looks like.
const FOREIGN: [&[u8]; 2] = [IGNORE_SHARED, b"mapped-ram"];

const NAME_MAX: u64 = 4096;
const CAPABILITIES_MAX: u64 = 256;
const SUBSECTIONS_MAX: usize = 16;

/// Where things are in a configuration section.
struct Layout {
    len: usize,
    /// The capabilities' subsection: where its count is, the count, and where its list ends.
    capabilities: Option<(usize, u32, usize)>,
    ignores_shared: bool,
}

/// Finds the end of the section that `bytes` begin with. Refuses what would change the format of the rest.
pub fn measure(bytes: &[u8]) -> Result<Step, StreamError> {
    step(layout(bytes, true).map(|l| l.len))
}

fn layout(bytes: &[u8], live: bool) -> Result<Layout, Stop> {
    let mut f = Fields::new(bytes);
    match f.u8()? {
        section::CONFIGURATION => {}
        other => return Err(StreamError::NoConfig(other).into()),
    }
    let len = f.u32()?;
    f.take(bounded("machine name", len, NAME_MAX)?)?;
    let mut out = Layout {
        len: 0,
        capabilities: None,
        ignores_shared: false,
    };
    for _ in 0..SUBSECTIONS_MAX {
        out.len = f.at();
        // In a live stream something always follows; a kept section ends with its bytes.
        match f.peek() {
            Ok(section::SUBSECTION) => {}
            Err(stop) if live => return Err(stop),
            _ => return Ok(out),
        }
        f.u8()?;
        let id = f.name()?;
        let _version = f.u32()?;
        match id {
            CAPABILITIES => capabilities(&mut f, live, &mut out)?,
            UUID => drop(f.take(16)?),
            PAGE_BITS_ID => match f.u32()? {
                PAGE_BITS => {}
                other => return Err(StreamError::PageBits(other).into()),
            },
            other => return Err(StreamError::Subsection(show(other)).into()),
        }
    }
    let what = "subsections of the configuration";
    Err(StreamError::TooMuch {
        what,
        value: SUBSECTIONS_MAX as u64 + 1,
        max: SUBSECTIONS_MAX as u64,
    }
    .into())
}

fn capabilities(f: &mut Fields<'_>, live: bool, out: &mut Layout) -> Result<(), Stop> {
    let at = f.at();
    let count = f.u32()?;
    for _ in 0..bounded("capabilities", count, CAPABILITIES_MAX)? {
        let name = f.name()?;
        if live && FOREIGN.contains(&name) {
            return Err(StreamError::Capability(show(name)).into());
        }
        out.ignores_shared |= name == IGNORE_SHARED;
    }
    out.capabilities = Some((at, count, f.at()));
    Ok(())
}

fn bounded(what: &'static str, value: u32, max: u64) -> Result<usize, Stop> {
    match u64::from(value) {
        v if v > max => Err(StreamError::TooMuch { what, value: v, max }.into()),
        v => Ok(v as usize),
    }
}

/// The same section with `x-ignore-shared` among its capabilities: QEMU refuses a stream whose list differs from its own.
pub fn with_ignore_shared(config: &[u8]) -> Result<Vec<u8>, StreamError> {
    let l = match layout(config, false) {
        Ok(l) if l.len == config.len() => l,
        Ok(_) => return Err(StreamError::Trailing),
        Err(Stop::Error(e)) => return Err(e),
        Err(Stop::Need(n)) => {
            let what = "configuration section, cut short: it needs";
            return Err(StreamError::TooMuch {
                what,
                value: n as u64,
                max: config.len() as u64,
            });
        }
    };
    let mut out = config.to_vec();
    if l.ignores_shared {
        return Ok(out);
    }
    match l.capabilities {
        Some((at, count, end)) => {
            out.splice(end..end, entry());
            out.splice(at..at + 4, (count + 1).to_be_bytes());
        }
        None => {
            out.push(section::SUBSECTION);
            out.push(CAPABILITIES.len() as u8);
            out.extend_from_slice(CAPABILITIES);
            out.extend_from_slice(&1u32.to_be_bytes());
            out.extend_from_slice(&1u32.to_be_bytes());
            out.extend(entry());
        }
    }
    Ok(out)
}

fn entry() -> impl Iterator<Item = u8> {
    std::iter::once(IGNORE_SHARED.len() as u8).chain(IGNORE_SHARED.iter().copied())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sub(id: &[u8], fields: &[u8]) -> Vec<u8> {
        [&[5, id.len() as u8][..], id, &1u32.to_be_bytes(), fields].concat()
    }

    fn config(subsections: &[Vec<u8>]) -> Vec<u8> {
        [&b"\x07\0\0\0\x03q35"[..], &subsections.concat()].concat()
    }

    fn caps(names: &[&[u8]]) -> Vec<u8> {
        let list: Vec<u8> = names.iter().flat_map(|n| [&[n.len() as u8][..], n].concat()).collect();
        sub(CAPABILITIES, &[&(names.len() as u32).to_be_bytes()[..], &list].concat())
    }

    #[test]
    fn the_end_is_found_only_with_the_byte_behind_it() {
        let c = config(&[
            sub(PAGE_BITS_ID, &12u32.to_be_bytes()),
            caps(&[b"events"]),
            sub(UUID, &[9; 16]),
        ]);
        let live = [&c[..], &[8]].concat();
        for cut in 0..live.len() {
            assert!(
                matches!(measure(&live[..cut]), Ok(Step::Need(n)) if n > cut && n <= live.len()),
                "{cut}"
            );
        }
        assert_eq!(measure(&live), Ok(Step::Took(c.len())));
    }

    #[test]
    fn the_capability_is_merged_into_what_is_there() {
        let bare = with_ignore_shared(&config(&[])).unwrap();
        assert_eq!(bare, config(&[caps(&[IGNORE_SHARED])]));
        let tail = sub(UUID, &[9; 16]);
        let merged = with_ignore_shared(&config(&[caps(&[b"events"]), tail.clone()])).unwrap();
        assert_eq!(merged, config(&[caps(&[b"events", IGNORE_SHARED]), tail.clone()]));
        assert_eq!(with_ignore_shared(&merged).unwrap(), merged);
        let other = with_ignore_shared(&config(std::slice::from_ref(&tail))).unwrap();
        assert_eq!(other, config(&[tail, caps(&[IGNORE_SHARED])]));
    }

    #[test]
    fn what_changes_the_format_is_refused_by_name() {
        let refused = |c: Vec<u8>| measure(&[&c[..], &[8]].concat()).unwrap_err();
        assert_eq!(
            refused(config(&[caps(&[b"mapped-ram"])])),
            StreamError::Capability("mapped-ram".into())
        );
        assert_eq!(
            refused(config(&[sub(b"configuration/new", &[])])),
            StreamError::Subsection("configuration/new".into())
        );
        assert_eq!(
            refused(config(&[sub(PAGE_BITS_ID, &16u32.to_be_bytes())])),
            StreamError::PageBits(16)
        );
        assert!(matches!(
            refused(b"\x07\xff\xff\xff\xff".to_vec()),
            StreamError::TooMuch { .. }
        ));
        assert!(matches!(
            refused(vec![tail_of(UUID); 17].concat()),
            StreamError::NoConfig(5)
        ));
        assert!(matches!(
            refused(config(&vec![sub(UUID, &[0; 16]); 17])),
            StreamError::TooMuch { .. }
        ));
        assert!(with_ignore_shared(&config(&[])[..6]).is_err());
        assert!(with_ignore_shared(&[&config(&[])[..], &[1]].concat()).is_err());
    }

    fn tail_of(id: &[u8]) -> Vec<u8> {
        sub(id, &[0; 16])
    }
}
