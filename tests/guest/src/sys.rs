//! The one door to the kernel: every unsafe call of the guest program is here, small and named.

use std::ffi::CString;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::time::Duration;

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Mounts a kernel file system; the folder is made if it is not there.
pub fn mount(fstype: &str, target: &str) -> io::Result<()> {
    let _ = std::fs::create_dir_all(target);
    let (fstype, target) = (CString::new(fstype)?, CString::new(target)?);
    // SAFETY: both strings are NUL-terminated and outlive the call; a null `data` means no options.
    check(unsafe { libc::mount(fstype.as_ptr(), target.as_ptr(), fstype.as_ptr(), 0, std::ptr::null()) })
}

/// Makes the console the standard input, output and error of PID 1.
pub fn use_console(path: &str) -> io::Result<()> {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path)?;
    for fd in 0..3 {
        // SAFETY: `file` is open; 0 to 2 are this process's own standard descriptors.
        check(unsafe { libc::dup2(file.as_raw_fd(), fd) })?;
    }
    Ok(())
}

/// Loads one kernel module. A module that is there already is no error.
pub fn load_module(path: &str) -> io::Result<()> {
    let file = std::fs::File::open(path)?;
    // SAFETY: the descriptor is open, and the parameter string is a NUL-terminated constant.
    let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    if result < 0 {
        let error = io::Error::last_os_error();
        return if error.raw_os_error() == Some(libc::EEXIST) {
            Ok(())
        } else {
            Err(error)
        };
    }
    Ok(())
}

/// CPU time that the calling thread has used.
pub fn thread_cpu() -> Duration {
    clock(libc::CLOCK_THREAD_CPUTIME_ID)
}

/// Time since boot, as the guest's clock tells it.
pub fn uptime() -> Duration {
    clock(libc::CLOCK_MONOTONIC)
}

fn clock(id: libc::clockid_t) -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid timespec that the kernel fills in.
    let result = unsafe { libc::clock_gettime(id, &mut time) };
    if result != 0 {
        return Duration::ZERO;
    }
    Duration::new(time.tv_sec.max(0) as u64, time.tv_nsec.clamp(0, 999_999_999) as u32)
}

/// Page-aligned anonymous memory of `words` words, zeroed, for the life of the program.
pub fn anonymous_words(words: usize) -> io::Result<&'static mut [u64]> {
    let bytes = words.checked_mul(8).ok_or(io::ErrorKind::OutOfMemory)?;
    // SAFETY: a new private mapping at an address of the kernel's choice touches no other memory.
    let address = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the mapping is `bytes` long, aligned, zeroed (a valid u64), never unmapped, and this is its only reference.
    Ok(unsafe { std::slice::from_raw_parts_mut(address.cast::<u64>(), words) })
}

/// The bytes of words, as they lie in memory.
pub fn bytes_of(words: &[u64]) -> &[u8] {
    // SAFETY: a u64 has no padding, and any alignment suits a u8; the length in bytes is that of the words.
    unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), size_of_val(words)) }
}

pub fn bytes_of_mut(words: &mut [u64]) -> &mut [u8] {
    // SAFETY: as above, and any bytes are valid words; the borrow is exclusive.
    unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), size_of_val(words)) }
}

/// A datagram socket to configure interfaces by.
pub struct Interfaces(std::os::fd::OwnedFd);

impl Interfaces {
    pub fn open() -> io::Result<Self> {
        use std::os::fd::FromRawFd;
        // SAFETY: plain system call without pointers.
        let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
        check(fd)?;
        // SAFETY: `fd` was just made and nobody else owns it.
        Ok(Interfaces(unsafe { std::os::fd::OwnedFd::from_raw_fd(fd) }))
    }

    pub fn set_address(&self, name: &str, address: Ipv4Addr, mask: Ipv4Addr) -> io::Result<()> {
        let mut request = interface_request(name)?;
        request.ifr_ifru.ifru_addr = socket_address(address);
        self.control(libc::SIOCSIFADDR, &request)?;
        request.ifr_ifru.ifru_netmask = socket_address(mask);
        self.control(libc::SIOCSIFNETMASK, &request)
    }

    pub fn up(&self, name: &str) -> io::Result<()> {
        let mut request = interface_request(name)?;
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        self.control(libc::SIOCSIFFLAGS, &request)
    }

    pub fn set_gateway(&self, gateway: Ipv4Addr) -> io::Result<()> {
        // SAFETY: rtentry is plain data, for which all zeros are valid.
        let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
        route.rt_dst = socket_address(Ipv4Addr::UNSPECIFIED);
        route.rt_genmask = socket_address(Ipv4Addr::UNSPECIFIED);
        route.rt_gateway = socket_address(gateway);
        route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
        self.control(libc::SIOCADDRT, &route)
    }

    /// `T` must be the structure that `request` reads.
    fn control<T>(&self, request: libc::c_ulong, argument: &T) -> io::Result<()> {
        // SAFETY: the callers above pair each request with its structure; it outlives the call and is only read.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), request as _, argument as *const T) })
    }
}

fn interface_request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: ifreq is plain data, for which all zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let inet = libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: 0,
        sin_addr: libc::in_addr {
            s_addr: u32::from(address).to_be(),
        },
        sin_zero: [0; 8],
    };
    // SAFETY: both are 16 bytes of plain data; sockaddr is the general view of sockaddr_in.
    unsafe { std::mem::transmute::<libc::sockaddr_in, libc::sockaddr>(inet) }
}
