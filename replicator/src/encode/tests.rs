use std::collections::HashMap;

use proptest::prelude::*;
use umbra_api::wire::setup::{Block, StreamSetup};

use super::*;
use crate::ram::{RamError, ShadowRam};

const PAGES: u64 = 300;

fn setup() -> StreamSetup {
    let block = |name: &str| Block {
        name: name.into(),
        bytes: PAGES << 12,
    };
    StreamSetup {
        version: 3,
        config: vec![7],
        ram_section: 2,
        ram_version: 4,
        blocks: vec![block("a"), block("b")],
    }
}

fn ram() -> ShadowRam {
    ShadowRam::new(&setup(), vec![]).unwrap()
}

fn noise(seed: u64) -> Page {
    let mut x = (seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    std::array::from_fn(|_| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x as u8
    })
}

/// What a guest does to a page before QEMU sends it.
#[derive(Clone, Debug)]
enum Write {
    Nothing,
    Zero,
    /// Compresses well up to 127, not at all above.
    Fill(u8),
    At(usize, u8),
}

fn write() -> impl Strategy<Value = Write> {
    prop_oneof![
        Just(Write::Nothing),
        Just(Write::Zero),
        any::<u8>().prop_map(Write::Fill),
        (0..PAGE_SIZE, any::<u8>()).prop_map(|(at, b)| Write::At(at, b)),
    ]
}

/// A guest, its encoder, and everything that was given away.
struct Source {
    encoder: Encoder,
    pages: HashMap<(u16, u64), Page>,
    out: Vec<Vec<u8>>,
    told: u64,
}

impl Source {
    fn new(level: i32, cached: usize) -> Self {
        let mut encoder = Encoder::new(Settings {
            level_min: level,
            level_rounds: level,
            level_max: level,
            delta_cache_bytes: cached * PAGE_SIZE,
        })
        .unwrap();
        encoder.setup(&setup());
        Self {
            encoder,
            pages: HashMap::new(),
            out: Vec::new(),
            told: 0,
        }
    }

    fn send(&mut self, block: u16, page: u64, write: &Write) {
        let data = self.pages.entry((block, page)).or_insert([0; PAGE_SIZE]);
        match write {
            Write::Nothing => {}
            Write::Zero => *data = [0; PAGE_SIZE],
            Write::Fill(n) if *n < 128 => *data = [*n; PAGE_SIZE],
            Write::Fill(n) => *data = noise((*n).into()),
            Write::At(at, b) => data[*at] = *b,
        }
        let out = &mut self.out;
        let mut sink = |p: &[u8]| {
            out.push(p.to_vec());
            Ok(())
        };
        self.encoder.page(block, page, Some(data), &mut sink).unwrap();
        self.told += 1;
    }

    fn round(&mut self) {
        let out = &mut self.out;
        let mut sink = |p: &[u8]| {
            out.push(p.to_vec());
            Ok(())
        };
        self.encoder.flush(&mut sink).unwrap();
        self.encoder.flush(&mut sink).unwrap();
        self.encoder.tick();
    }
}

fn apply(batches: &[Vec<u8>], ram: &mut ShadowRam) -> Applied {
    let mut d = Decoder::new().unwrap();
    let mut sum = Applied::default();
    for b in batches {
        let a = d.apply(b, ram).unwrap();
        sum.pages += a.pages;
        sum.zeros += a.zeros;
    }
    sum
}

fn read(ram: &ShadowRam, block: u16, page: u64) -> Page {
    let mut data = [1; PAGE_SIZE];
    ram.read_page(block, page, &mut data).unwrap();
    data
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a guest does, over rounds, with a cache that holds all or little or nothing.
    #[test]
    fn the_target_has_what_the_guest_had(
        rounds in prop::collection::vec(
            prop::collection::vec((0u16..2, prop_oneof![0u64..24, 0..PAGES], write()), 0..200),
            1..6,
        ),
        level in prop_oneof![Just(0), Just(1), Just(3), Just(-5)],
        cached in prop_oneof![Just(0usize), Just(8), Just(16), Just(600)],
    ) {
        let mut s = Source::new(level, cached);
        for round in &rounds {
            for (block, page, write) in round {
                s.send(*block, *page, write);
            }
            s.round();
        }
        let mut got = ram();
        let sum = apply(&s.out, &mut got);
        let stats = s.encoder.stats();
        prop_assert_eq!(stats.pages(), s.told);
        prop_assert_eq!(sum.zeros, stats.zero.pages);
        prop_assert_eq!(sum.pages + sum.zeros + stats.same.pages, s.told);
        let sent = s.out.iter().map(Vec::len).sum::<usize>() as u64;
        prop_assert!(stats.bytes() <= sent && sent <= stats.bytes() + 6 * s.out.len() as u64, "{stats:?}");
        for ((block, page), data) in &s.pages {
            let have = read(&got, *block, *page);
            prop_assert!(have == *data, "page {page} of block {block}");
            let hash = (!is_zero(data)).then(|| PageHash::of(data));
            prop_assert_eq!(s.encoder.sent(*block, *page), hash);
        }
    }

    #[test]
    fn damaged_batches_are_errors_or_other_pages(
        pages in prop::collection::vec((0u16..2, 0..PAGES, write()), 1..20),
        hits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut s = Source::new(1, 16);
        for (block, page, write) in &pages {
            s.send(*block, *page, write);
        }
        s.round();
        let mut d = Decoder::new().unwrap();
        for b in &mut s.out {
            for (at, v) in &hits {
                let at = at.index(b.len());
                b[at] = *v;
            }
            let _ = d.apply(b, &mut ram());
            let _ = d.apply(&b[..cut.index(b.len())], &mut ram());
        }
    }
}

/// One of each kind, in the order in which they come to be.
#[test]
fn every_kind_of_page_is_used_where_it_helps() {
    let mut s = Source::new(1, 64);
    let step = |s: &mut Source, page, write| {
        let (before, from) = (s.encoder.stats(), s.out.len());
        s.send(0, page, &write);
        s.round();
        let bytes = s.out[from..].iter().map(Vec::len).sum::<usize>();
        let grown = |(a, b): &((&'static str, _), (&str, _))| {
            let (a, b): (umbra_api::replica::PageCount, umbra_api::replica::PageCount) = (a.1, b.1);
            a.pages > b.pages
        };
        let now = s.encoder.stats().all().into_iter().zip(before.all()).find(grown);
        (now.unwrap().0.0, bytes)
    };
    assert_eq!(step(&mut s, 1, Write::Zero), ("zero", 22));
    let (kind, bytes) = step(&mut s, 1, Write::Fill(7));
    assert!(kind == "zstd" && bytes < 60, "{kind} {bytes}");
    assert_eq!(step(&mut s, 1, Write::Nothing), ("same", 0));
    assert_eq!(step(&mut s, 2, Write::Fill(7)), ("known", 30));
    let (kind, bytes) = step(&mut s, 3, Write::Fill(200));
    assert!(kind == "raw" && bytes < PAGE_SIZE + 30, "{kind} {bytes}");
    // For the second time: from now on there is a version to compare with.
    assert_eq!(step(&mut s, 3, Write::At(100, 1)).0, "raw");
    let (kind, bytes) = step(&mut s, 3, Write::At(100, 2));
    assert!(kind == "delta" && bytes < 40, "{kind} {bytes}");
    assert_eq!(step(&mut s, 3, Write::Nothing), ("same", 0));
    assert_eq!(step(&mut s, 3, Write::Fill(201)).0, "raw");
    assert_eq!(step(&mut s, 3, Write::At(9, 3)).0, "delta");
    let mut got = ram();
    apply(&s.out, &mut got);
    assert!(read(&got, 0, 3) == s.pages[&(0, 3)] && read(&got, 0, 2) == [7; PAGE_SIZE]);
}

/// The other side of resumption: what the target told of its pages needs not travel.
#[test]
fn what_the_target_holds_from_before_does_not_travel() {
    let mut s = Source::new(1, 64);
    for page in 0..8 {
        s.encoder.target_holds(0, page, PageHash::of(&noise(128 + page)));
    }
    for page in 0..8 {
        s.send(0, page, &Write::Fill(128 + page as u8));
    }
    s.send(1, 0, &Write::Fill(130));
    s.send(0, 5, &Write::At(0, 0));
    s.send(0, 5, &Write::At(0, 1));
    s.round();
    let stats = s.encoder.stats();
    assert_eq!((stats.same.pages, stats.known.pages), (8, 1));
    assert_eq!((stats.raw.pages, stats.delta.pages), (1, 1));
    let mut got = ram();
    for page in 0..8 {
        got.write_page(0, page, &noise(128 + page)).unwrap();
    }
    apply(&s.out, &mut got);
    assert!(read(&got, 0, 5) == s.pages[&(0, 5)] && read(&got, 1, 0) == noise(130));
}

/// A target whose RAM is not what the source believes is never taken for good.
#[test]
fn a_base_that_is_not_the_senders_is_an_integrity_error() {
    let mut s = Source::new(1, 64);
    for write in [Write::Fill(200), Write::At(5, 1)] {
        s.send(0, 3, &write);
    }
    s.send(1, 9, &Write::Fill(100));
    s.round();
    let seed = s.out.clone();
    s.send(0, 3, &Write::At(5, 2));
    s.round();
    s.send(0, 4, &Write::Fill(100));
    s.round();
    let (delta, known) = (&s.out[seed.len()], &s.out[seed.len() + 1]);
    let check = |batch: &Vec<u8>, block, page, at: usize| {
        let mut ram = ram();
        apply(&seed, &mut ram);
        let mut data = read(&ram, block, page);
        data[at] ^= 0x10;
        ram.write_page(block, page, &data).unwrap();
        Decoder::new().unwrap().apply(batch, &mut ram).unwrap_err().to_string()
    };
    let e = check(delta, 0, 3, 4000);
    assert!(
        e.starts_with("integrity: a batch of RAM block 0, 1 pages around page 3"),
        "{e}"
    );
    let e = check(known, 1, 9, 0);
    assert!(
        e.starts_with("integrity: a batch of RAM block 0, 1 pages around page 4"),
        "{e}"
    );
    let mut whole = ram();
    apply(&s.out, &mut whole);
}

#[test]
fn zeros_are_seen_wherever_the_one_byte_is() {
    assert!(is_zero(&[0; PAGE_SIZE]));
    for at in 0..PAGE_SIZE {
        let mut p = [0; PAGE_SIZE];
        p[at] = 1;
        assert!(!is_zero(&p), "{at}");
    }
}

#[test]
fn a_guest_of_zeros_travels_in_a_few_bytes() {
    let mut s = Source::new(1, 0);
    for page in 0..PAGES {
        s.send(0, page, &Write::Zero);
    }
    s.round();
    assert_eq!((s.out.len(), s.out[0].len()), (1, 23));
    assert_eq!(s.encoder.stats().zero.bytes, 23);
}

#[test]
fn incompressible_pages_go_raw_and_others_among_them_are_noticed() {
    let mut e = Encoder::new(Settings {
        level_min: 1,
        level_rounds: 1,
        level_max: 1,
        delta_cache_bytes: 0,
    })
    .unwrap();
    let mut lens = Vec::new();
    let mut sink = |p: &[u8]| {
        lens.push(p.len());
        Ok(())
    };
    let mut text = [0; PAGE_SIZE];
    for n in 0..20 * 256u64 {
        text.iter_mut()
            .zip(format!("line {n} of a log. ").bytes().cycle())
            .for_each(|(to, b)| *to = b);
        let data = if n / 256 == 17 { text } else { noise(n) };
        e.page(0, n, Some(&data), &mut sink).unwrap();
    }
    e.flush(&mut sink).unwrap();
    assert_eq!(lens.len(), 20);
    for (n, len) in lens.iter().enumerate() {
        assert_eq!(*len < 256 << 10, n == 17, "batch {n}: {len}");
    }
    assert_eq!((e.stats().raw.pages, e.stats().zstd.pages), (19 * 256, 256));
}

fn batch_of_one(data: &[u8]) -> Vec<u8> {
    let (mut payload, mut runs) = (Vec::new(), Runs::default());
    runs.push(PageKind::Full, 1);
    encode_head(&mut payload, 0, Encoding::Zstd, &mut runs, PAGE_SIZE, 0);
    payload.extend_from_slice(data);
    payload
}

#[test]
fn a_zstd_frame_that_grows_beyond_its_word_is_refused() {
    let mut d = Decoder::new().unwrap();
    let grows = batch_of_one(&zstd::bulk::compress(&vec![0; 1 << 20], 1).unwrap());
    assert!(matches!(d.apply(&grows, &mut ram()), Err(ApplyError::Zstd(_))));
    let small = batch_of_one(&zstd::bulk::compress(&[1; 100], 1).unwrap());
    assert!(matches!(
        d.apply(&small, &mut ram()),
        Err(ApplyError::Length { have: 100, want: 4096 })
    ));
    let another = batch_of_one(&zstd::bulk::compress(&[1; PAGE_SIZE], 1).unwrap());
    assert!(matches!(
        d.apply(&another, &mut ram()),
        Err(ApplyError::Sum { want: 0, .. })
    ));
}

#[test]
fn pages_beyond_their_block_are_refused() {
    let refused = |kind, block, page| {
        let (mut payload, mut runs) = (Vec::new(), Runs::default());
        runs.push(kind, page);
        let mut data = Vec::new();
        if kind == PageKind::Known {
            put_known(&mut data, 1, PAGES);
        }
        encode_head(&mut payload, block, Encoding::Raw, &mut runs, data.len(), 0);
        payload.extend_from_slice(&data);
        Decoder::new().unwrap().apply(&payload, &mut ram()).unwrap_err()
    };
    for (kind, page) in [(PageKind::Zero, PAGES), (PageKind::Known, 0)] {
        let e = refused(kind, 0, page);
        assert!(matches!(e, ApplyError::Ram(RamError::OutOfBlock { .. })), "{e}");
    }
    let e = refused(PageKind::Zero, 7, 0);
    assert!(
        matches!(e, ApplyError::Ram(RamError::UnknownBlock { block: 7, .. })),
        "{e}"
    );
}
