//! The test guest itself: if it did not notice a wrong page, no other test's `err=0` would mean anything. So its memory is
//! damaged from outside, and it must tell.

use std::fs::{File, OpenOptions};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use umbra_tests::lab::process::wait_for;
use umbra_tests::lab::vm::{Console, GuestImage, HTTP, Stats, UDP_ECHO, Vm, VmSpec, qemu, stats};
use umbra_tests::lab::{Lab, sys};

const PAGE: usize = 4096;
/// The first eight bytes of each page of the guest's pattern; its number and its generation follow.
const MAGIC: u64 = u64::from_le_bytes(*b"UMBRAPAT");
/// The scrubber goes round in about ten seconds; a busy machine may be much slower.
const NOTICE: Duration = Duration::from_secs(120);

/// Prints why not, and skips, where no guest can run.
fn image() -> Result<Option<GuestImage>> {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIPPED: network namespaces need root");
        return Ok(None);
    }
    match qemu().and_then(|_| GuestImage::find()) {
        Ok(image) => Ok(Some(image)),
        Err(error) => {
            println!("SKIPPED: {error:#}");
            Ok(None)
        }
    }
}

fn boot(lab: &Lab, image: &GuestImage, name: &str, number: u8) -> Result<Vm> {
    let mut vm = Vm::start(lab.host("a")?, image, &VmSpec::new(name, number))?;
    vm.wait_up(&lab.client)?;
    Ok(vm)
}

fn wait_stats(lab: &Lab, vm: &Vm, what: &str, enough: impl Fn(&Stats) -> bool) -> Result<Stats> {
    wait_for(what, NOTICE, || {
        Ok(Some(stats(&lab.client, vm.spec.ip)?).filter(&enough))
    })
}

/// The guest's memory, as QEMU's process has it.
struct Memory {
    file: File,
    pages: Vec<PatternPage>,
}

#[derive(Clone, Copy)]
struct PatternPage {
    at: u64,
    number: u64,
}

impl Memory {
    fn of(vm: &Vm) -> Result<Self> {
        let pid = vm.process.pid();
        let bytes = u64::from(vm.spec.mem_mib) << 20;
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
        let start = maps.lines().filter_map(range).find(|(from, to)| to - from == bytes);
        let (start, _) = start.context("QEMU has no mapping of the guest's size")?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(format!("/proc/{pid}/mem"))?;
        let mut pages = Vec::new();
        for at in (start..start + bytes).step_by(PAGE) {
            let mut head = [0; 16];
            file.read_exact_at(&mut head, at)?;
            if word(&head, 0) == MAGIC {
                pages.push(PatternPage {
                    at,
                    number: word(&head, 1),
                });
            }
        }
        Ok(Self { file, pages })
    }

    fn page(&self, number: u64) -> Result<PatternPage> {
        self.pages
            .iter()
            .find(|page| page.number == number)
            .copied()
            .with_context(|| format!("no page {number}"))
    }

    fn read(&self, page: PatternPage) -> Result<Vec<u8>> {
        let mut content = vec![0; PAGE];
        self.file.read_exact_at(&mut content, page.at)?;
        Ok(content)
    }

    fn write(&self, page: PatternPage, content: &[u8]) -> Result<()> {
        Ok(self.file.write_all_at(content, page.at)?)
    }
}

/// The addresses of a line of /proc/PID/maps.
fn range(line: &str) -> Option<(u64, u64)> {
    let (from, to) = line.split_once(' ')?.0.split_once('-')?;
    Some((u64::from_str_radix(from, 16).ok()?, u64::from_str_radix(to, 16).ok()?))
}

fn word(bytes: &[u8], index: usize) -> u64 {
    let bytes = bytes.get(index * 8..index * 8 + 8).and_then(|b| b.try_into().ok());
    bytes.map_or(0, u64::from_le_bytes)
}

fn console(vm: &Vm) -> String {
    String::from_utf8_lossy(&std::fs::read(&vm.serial).unwrap_or_default()).into_owned()
}

#[test]
fn answers_obeys_and_finds_nothing_wrong_with_itself() -> Result<()> {
    let Some(image) = image()? else { return Ok(()) };
    let lab = Lab::new(&["a"])?;
    let vm = boot(&lab, &image, "good", 31)?;
    let to = (vm.spec.ip, HTTP);

    let reply = lab.client.get(to, "/")?.ok()?.text();
    ensure!(reply.starts_with("ok "), "GET / said {reply:?}");
    ensure!(
        lab.client.post(to, "/burn", "0:7")?.status == 400,
        "a share of 7 was taken"
    );
    ensure!(
        lab.client.post(to, "/dirty", "many")?.status == 400,
        "a rate of 'many' was taken"
    );
    lab.client.post(to, "/burn", "0:0.5")?.ok()?;
    lab.client.post(to, "/dirty", "3000")?.ok()?;

    let socket = sys::in_netns(lab.client.ns.fd(), || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)))?;
    socket.connect((vm.spec.ip, UDP_ECHO))?;
    socket.set_read_timeout(Some(NOTICE))?;
    socket.send(b"are you there?")?;
    let mut answer = [0; 64];
    let length = socket.recv(&mut answer)?;
    ensure!(
        answer.get(..length) == Some(b"are you there?".as_slice()),
        "the echo was another one"
    );

    let before = stats(&lab.client, vm.spec.ip)?;
    ensure!(
        before.pattern_pages * PAGE as u64 > (u64::from(vm.spec.mem_mib) << 20) / 3,
        "a small pattern: {before:?}"
    );
    let after = wait_stats(&lab, &vm, "the scrubber to go round", |s| {
        s.scrubbed_pages > before.scrubbed_pages + s.pattern_pages && s.dirty_pages > before.dirty_pages + 3000
    })?;
    ensure!(after.errors == 0 && after.counter > before.counter, "{after:?}");
    let told = Console::read(&vm.serial);
    ensure!(told.errors == 0 && told.jumps == 0, "{told:?}: {}", console(&vm));
    ensure!(
        !console(&vm).lines().any(|line| line.starts_with(['W', 'E'])),
        "it complains: {}",
        console(&vm)
    );
    Ok(())
}

#[test]
fn one_flipped_bit_is_told() -> Result<()> {
    let Some(image) = image()? else { return Ok(()) };
    let lab = Lab::new(&["a"])?;
    let vm = boot(&lab, &image, "flip", 32)?;
    let memory = Memory::of(&vm)?;
    let found = memory.pages.len() as u64;
    ensure!(
        found == stats(&lab.client, vm.spec.ip)?.pattern_pages,
        "{found} pattern pages found in the memory"
    );

    let page = memory.page(found / 2)?;
    let mut content = memory.read(page)?;
    if let Some(last) = content.last_mut() {
        *last ^= 0x10;
    }
    memory.write(page, &content)?;
    wait_stats(&lab, &vm, "the guest to find the bit", |s| s.errors == 1)?;
    wait_for("the console to tell it", NOTICE, || {
        Ok((Console::read(&vm.serial).errors == 1).then_some(()))
    })?;
    ensure!(
        console(&vm).contains(&format!("E Broken {{ page: {:x}", page.number)),
        "{}",
        console(&vm)
    );
    Ok(())
}

#[test]
fn a_page_from_the_past_is_told() -> Result<()> {
    let Some(image) = image()? else { return Ok(()) };
    let lab = Lab::new(&["a"])?;
    let vm = boot(&lab, &image, "stale", 33)?;
    let memory = Memory::of(&vm)?;
    // One of the pages that are written again and again.
    let page = memory.page(3)?;
    let old = memory.read(page)?;
    lab.client.post((vm.spec.ip, HTTP), "/dirty", "4000")?.ok()?;
    wait_for("the page to be written again", NOTICE, || {
        Ok((word(&memory.read(page)?, 2) != word(&old, 2)).then_some(()))
    })?;
    ensure!(
        stats(&lab.client, vm.spec.ip)?.errors == 0,
        "errors before anything was done to the memory"
    );

    memory.write(page, &old)?;
    wait_stats(&lab, &vm, "the guest to find the old page", |s| s.errors > 0)?;
    ensure!(console(&vm).contains("page: 3,"), "{}", console(&vm));
    Ok(())
}
