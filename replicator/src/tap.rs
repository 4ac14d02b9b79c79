//! Taps of shadows and the bridges they are ports of, in the network namespace of the calling thread.
//!
//! Made by one ioctl, then handled over rtnetlink, whose messages are built here byte by byte: four kinds of request do not
//! weigh up a netlink crate. Not by `ip`, which may be missing, and not by /sys/class/net, which shows the namespace
//! that sysfs was mounted in.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};
use umbra_api::VmId;

/// Longest name of an interface.
const NAME_MAX: usize = libc::IFNAMSIZ - 1;

/// A network interface.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub up: bool,
    pub mtu: Option<u32>,
    /// Index of the bridge that it is a port of.
    pub master: Option<u32>,
}

/// Name of a shadow's tap: recognisable by its `um`, unique by a hash of the VM and the session.
pub fn name_of(vm: VmId, session: u64, nic: usize) -> String {
    // FNV-1a: stable across versions and machines, which std's hasher does not promise.
    let bytes = vm.0.as_bytes().iter().copied().chain(session.to_le_bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("um{:010x}n{}", hash >> 24, nic % 100)
}

/// Makes a tap that stays when the descriptor is closed. Fails if the name is taken.
pub fn create(name: &str, multi_queue: bool) -> io::Result<()> {
    check_name(name)?;
    let device = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_TUN_EXCL;
    if multi_queue {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    // SAFETY: an ifreq is plain old data, for which all zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: `request` is a whole ifreq that outlives the call, as TUNSETIFF wants it.
    let made = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if made < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: TUNSETPERSIST takes its argument by value.
    let kept = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETPERSIST, 1) };
    if kept < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Makes an interface a port of a bridge, with the bridge's MTU, and brings it up.
pub fn plug(name: &str, bridge: &str) -> io::Result<()> {
    let port = need(name)?;
    let bridge = need(bridge)?;
    // A port needs no address of its own, and its router solicitations would reach the guest's network. A kernel without
    // IPv6 has no such file.
    let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
    let mut request = Request::new(libc::RTM_NEWLINK, libc::NLM_F_REQUEST | libc::NLM_F_ACK, port.index);
    request.flags(libc::IFF_UP as u32, libc::IFF_UP as u32);
    request.attribute(libc::IFLA_MASTER, &bridge.index.to_ne_bytes());
    if let Some(mtu) = bridge.mtu {
        request.attribute(libc::IFLA_MTU, &mtu.to_ne_bytes());
    }
    request.run().map(drop)
}

/// Removes an interface; one that is gone already is no error.
pub fn remove(name: &str) -> io::Result<()> {
    let Some(link) = link(name)? else { return Ok(()) };
    let request = Request::new(libc::RTM_DELLINK, libc::NLM_F_REQUEST | libc::NLM_F_ACK, link.index);
    match request.run() {
        Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        other => other.map(drop),
    }
}

/// The interface of that name, if there is one.
pub fn link(name: &str) -> io::Result<Option<Link>> {
    check_name(name)?;
    let mut request = Request::new(libc::RTM_GETLINK, libc::NLM_F_REQUEST, 0);
    let mut bytes = name.as_bytes().to_vec();
    bytes.push(0);
    request.attribute(libc::IFLA_IFNAME, &bytes);
    found(request.run())
}

/// The bridge that an interface is a port of.
pub fn bridge_of(name: &str) -> io::Result<Option<String>> {
    let Some(index) = link(name)?.and_then(|l| l.master) else {
        return Ok(None);
    };
    let master = found(Request::new(libc::RTM_GETLINK, libc::NLM_F_REQUEST, index).run())?;
    Ok(master.map(|l| l.name))
}

/// All interfaces.
pub fn links() -> io::Result<Vec<Link>> {
    let flags = libc::NLM_F_REQUEST | libc::NLM_F_DUMP;
    Request::new(libc::RTM_GETLINK, flags, 0).run()
}

/// Runs `f` in the network namespace of another process.
pub fn in_netns_of<T: Send>(pid: i32, f: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let namespace = fs::File::open(format!("/proc/{pid}/ns/net"))?;
    // A thread of its own: it can't be left in a foreign namespace, whatever `f` does.
    std::thread::scope(|scope| {
        let work = scope.spawn(move || {
            nix::sched::setns(&namespace, nix::sched::CloneFlags::CLONE_NEWNET)?;
            f()
        });
        work.join()
            .unwrap_or_else(|_| Err(io::Error::other("a thread in another namespace panicked")))
    })
}

fn need(name: &str) -> io::Result<Link> {
    link(name)?.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("no interface {name}")))
}

fn found(answer: io::Result<Vec<Link>>) -> io::Result<Option<Link>> {
    match answer {
        Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        other => other.map(|links| links.into_iter().next()),
    }
}

fn check_name(name: &str) -> io::Result<()> {
    let fine = !name.is_empty() && name.len() <= NAME_MAX && !name.bytes().any(|b| b == b'/' || b == 0 || b == b' ');
    if fine {
        Ok(())
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{name:?} names no interface"),
        ))
    }
}

const HEADER_LEN: usize = 16;
const IFINFO_LEN: usize = 16;

/// One rtnetlink request about a link: nlmsghdr, ifinfomsg, attributes.
struct Request {
    bytes: Vec<u8>,
    dump: bool,
}

impl Request {
    fn new(kind: u16, flags: i32, index: u32) -> Self {
        let mut bytes = vec![0; HEADER_LEN + IFINFO_LEN];
        put(&mut bytes, 4, &kind.to_ne_bytes());
        put(&mut bytes, 6, &(flags as u16).to_ne_bytes());
        put(&mut bytes, 8, &1_u32.to_ne_bytes());
        put(&mut bytes, HEADER_LEN + 4, &index.to_ne_bytes());
        Self {
            bytes,
            dump: flags & libc::NLM_F_DUMP == libc::NLM_F_DUMP,
        }
    }

    fn flags(&mut self, flags: u32, change: u32) {
        put(&mut self.bytes, HEADER_LEN + 8, &flags.to_ne_bytes());
        put(&mut self.bytes, HEADER_LEN + 12, &change.to_ne_bytes());
    }

    fn attribute(&mut self, kind: u16, value: &[u8]) {
        let len = (4 + value.len()) as u16;
        self.bytes.extend_from_slice(&len.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn run(mut self) -> io::Result<Vec<Link>> {
        let len = self.bytes.len() as u32;
        put(&mut self.bytes, 0, &len.to_ne_bytes());
        let kind = SockProtocol::NetlinkRoute;
        let socket: OwnedFd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, kind)?;
        send(socket.as_raw_fd(), &self.bytes, MsgFlags::empty())?;
        let mut links = Vec::new();
        let mut buffer = vec![0; 64 << 10];
        loop {
            let n = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            if parse(buffer.get(..n).unwrap_or_default(), &mut links)? || (!self.dump && !links.is_empty()) {
                return Ok(links);
            }
        }
    }
}

/// Takes one datagram; true when the answer is complete.
fn parse(mut bytes: &[u8], links: &mut Vec<Link>) -> io::Result<bool> {
    while bytes.len() >= HEADER_LEN {
        let len = u32_at(bytes, 0) as usize;
        let Some(message) = bytes.get(..len).filter(|m| m.len() >= HEADER_LEN) else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "netlink message of an impossible length",
            ));
        };
        let body = message.get(HEADER_LEN..).unwrap_or_default();
        match i32::from(u16_at(message, 4)) {
            libc::NLMSG_DONE => return Ok(true),
            libc::NLMSG_ERROR => {
                return match u32_at(body, 0).cast_signed() {
                    0 => Ok(true),
                    code => Err(io::Error::from_raw_os_error(code.saturating_neg())),
                };
            }
            _ => links.extend(parse_link(body)),
        }
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

fn parse_link(body: &[u8]) -> Option<Link> {
    let mut attributes = body.get(IFINFO_LEN..)?;
    let up = u32_at(body, 8) & libc::IFF_UP as u32 != 0;
    let mut link = Link {
        index: u32_at(body, 4),
        name: String::new(),
        up,
        mtu: None,
        master: None,
    };
    while attributes.len() >= 4 {
        let len = usize::from(u16_at(attributes, 0));
        let value = attributes.get(4..len)?;
        match u16_at(attributes, 2) {
            libc::IFLA_IFNAME => link.name = String::from_utf8_lossy(value.strip_suffix(&[0]).unwrap_or(value)).into(),
            libc::IFLA_MTU => link.mtu = Some(u32_at(value, 0)),
            libc::IFLA_MASTER => link.master = Some(u32_at(value, 0)),
            _ => {}
        }
        attributes = attributes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(link)
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(to) = bytes.get_mut(at..at + value.len()) {
        to.copy_from_slice(value);
    }
}

/// Zero where there is nothing: the kernel's messages are whole, and nothing else is read with it.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..)
        .and_then(|b| b.first_chunk())
        .map_or(0, |b| u32::from_ne_bytes(*b))
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes
        .get(at..)
        .and_then(|b| b.first_chunk())
        .map_or(0, |b| u16::from_ne_bytes(*b))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_fit_and_differ() {
        let vm = VmId(uuid::Uuid::from_u128(7));
        let name = name_of(vm, u64::MAX, 99);
        assert!(name.len() <= NAME_MAX && name.starts_with("um"), "{name}");
        assert_ne!(name_of(vm, 1, 0), name_of(vm, 2, 0));
        assert_ne!(name_of(vm, 1, 0), name_of(vm, 1, 1));
        assert_ne!(name_of(vm, 1, 0), name_of(VmId(uuid::Uuid::from_u128(8)), 1, 0));
        assert!(check_name("a b").is_err() && check_name("").is_err() && check_name("0123456789abcdef").is_err());
    }

    #[test]
    fn every_machine_has_its_loopback() {
        let lo = link("lo").unwrap().unwrap();
        assert_eq!((lo.name.as_str(), lo.master), ("lo", None));
        assert!(links().unwrap().iter().any(|l| l.name == "lo"));
        assert_eq!(link("umbra-no-such").unwrap(), None);
        assert_eq!(bridge_of("lo").unwrap(), None);
        remove("umbra-no-such").unwrap();
    }

    proptest! {
        #[test]
        fn no_datagram_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut links = Vec::new();
            let _ = parse(&bytes, &mut links);
        }
    }
}
