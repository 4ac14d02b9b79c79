//! Streams made by the composer, whole, cut anywhere, and broken in every way.

use proptest::prelude::*;
use umbra_api::wire::setup::{Block, StreamSetup};

use super::compose::Composer;
use super::items::{PAGE_SIZE, command};
use super::{Event, Limits, Page, Parser, Section, StreamError};

/// An event that owns its bytes. Pieces of device state are joined, as their cuts are those of the pushes.
#[derive(Clone, PartialEq, Debug)]
enum Seen {
    Setup(StreamSetup),
    Ping(u32),
    Page(u16, u64, u8),
    Zero(u16, u64),
    Section(Section),
    Device(Vec<u8>),
    Complete(u64),
}

fn note(seen: &mut Vec<Seen>, event: Event<'_>) {
    let event = match event {
        Event::Setup(s) => Seen::Setup(s.clone()),
        Event::Ping(n) => Seen::Ping(n),
        Event::Page { block, page, data } => {
            assert!(data.iter().all(|b| *b == data[0]), "a page of mixed origin");
            Seen::Page(block, page, data[0])
        }
        Event::Zero { block, page } => Seen::Zero(block, page),
        Event::Section(s) => Seen::Section(s),
        Event::Device(piece) => {
            if let Some(Seen::Device(all)) = seen.last_mut() {
                all.extend_from_slice(piece);
                return;
            }
            Seen::Device(piece.to_vec())
        }
        Event::Complete { device_bytes } => Seen::Complete(device_bytes),
    };
    seen.push(event);
}

fn parse(pieces: &[&[u8]]) -> (Vec<Seen>, Result<(), StreamError>) {
    let (mut p, mut seen) = (Parser::new(limits()), Vec::new());
    for piece in pieces {
        let r = p.push(piece, &mut |e: Event<'_>| {
            note(&mut seen, e);
            Ok::<_, StreamError>(())
        });
        if r.is_err() {
            assert_eq!(p.push(&[], &mut |_: Event<'_>| Ok(())), Err(StreamError::Failed));
            return (seen, r);
        }
    }
    (seen, Ok(()))
}

fn limits() -> Limits {
    Limits {
        device_bytes: 1 << 16,
        description_bytes: 1 << 12,
    }
}

fn setup() -> StreamSetup {
    let block = |name: &str, pages: u64| Block {
        name: name.into(),
        bytes: pages << 12,
    };
    StreamSetup {
        version: 3,
        config: b"\x07\0\0\0\x0bpc-q35-10.0".to_vec(),
        ram_section: 2,
        ram_version: 4,
        blocks: vec![
            block("pc.ram", 1 << 20),
            block("empty", 0),
            block("pc.bios", 64),
            block("/rom@etc/acpi/tables", 32),
        ],
    }
}

const JSON: &[u8] = br#"{"configuration":{},"page_size":4096,"devices":[{"name":"timer","instance_id":0}]}"#;

fn header(c: &mut Composer<'_>) {
    let config = setup().config;
    c.header(&config)
        .command(command::OPEN_RETURN_PATH, &[])
        .command(command::PING, &[0, 0, 0, 1])
        .ram_start(false);
}

fn tail(c: &mut Composer<'_>, state: &[u8]) {
    c.raw(b"\x04\0\0\0\x03\x05timer\0\0\0\0\0\0\0\x02")
        .raw(state)
        .raw(b"\x7e\0\0\0\x03")
        .description(JSON);
}

/// One page of a section: block, page, and its fill; 0 is a zero page.
type Pages = Vec<(u16, u64, u8)>;

fn stream(sections: &[Pages], state: &[u8]) -> (Vec<u8>, Vec<Seen>) {
    let setup = setup();
    let mut c = Composer::new(&setup);
    header(&mut c);
    let mut want = vec![Seen::Ping(1), Seen::Setup(setup.clone())];
    for (i, pages) in sections.iter().enumerate() {
        let end = i + 1 == sections.len();
        match end {
            true => c.command(command::SWITCHOVER_START, &[]).end(),
            false => c.part(),
        };
        for (block, page, fill) in pages {
            match fill {
                0 => c.page(*block, *page, None),
                fill => c.page(*block, *page, Some(&[*fill; PAGE_SIZE])),
            };
            want.push(if *fill == 0 {
                Seen::Zero(*block, *page)
            } else {
                Seen::Page(*block, *page, *fill)
            });
        }
        c.eos();
        let zeros = pages.iter().filter(|p| p.2 == 0).count() as u64;
        want.push(Seen::Section(Section {
            end,
            pages: pages.len() as u64 - zeros,
            zeros,
            at: c.len() as u64,
        }));
        c.footer();
    }
    let device_from = c.len();
    tail(&mut c, state);
    let bytes = c.into_bytes();
    want.push(Seen::Device(bytes[device_from..].to_vec()));
    want.push(Seen::Complete((bytes.len() - device_from) as u64));
    (bytes, want)
}

fn sections() -> impl Strategy<Value = Vec<Pages>> {
    let page = prop_oneof![
        (Just(0u16), 0u64..1 << 20, any::<u8>()),
        (Just(2u16), 0u64..64, any::<u8>()),
        (Just(3u16), 0u64..32, any::<u8>()),
    ];
    prop::collection::vec(prop::collection::vec(page, 0..4), 1..4)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_stream_is_understood_however_it_is_cut(
        sections in sections(),
        state in prop::collection::vec(any::<u8>(), 0..64),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
    ) {
        let (bytes, want) = stream(&sections, &state);
        let whole = parse(&[&bytes]);
        prop_assert_eq!(&whole.1, &Ok(()));
        prop_assert_eq!(&whole.0, &want);
        let mut cuts: Vec<_> = cuts.iter().map(|c| c.index(bytes.len())).chain([0, bytes.len()]).collect();
        cuts.sort_unstable();
        let pieces: Vec<_> = cuts.windows(2).map(|w| &bytes[w[0]..w[1]]).collect();
        prop_assert_eq!(&parse(&pieces), &whole);
        prop_assert_eq!(&parse(&bytes.chunks(1).collect::<Vec<_>>()), &whole);
    }

    #[test]
    fn a_truncated_stream_is_never_complete(sections in sections(), cut in any::<prop::sample::Index>()) {
        let (bytes, want) = stream(&sections, b"state");
        let (seen, r) = parse(&[&bytes[..cut.index(bytes.len())]]);
        prop_assert_eq!(r, Ok(()));
        prop_assert!(seen.len() < want.len());
        let events = seen.iter().filter(|s| !matches!(s, Seen::Device(_)));
        prop_assert!(events.zip(&want).all(|(a, b)| a == b));
    }

    #[test]
    fn damage_is_an_error_or_other_pages_but_never_a_panic(
        sections in sections(),
        hits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let (mut bytes, _) = stream(&sections, b"state");
        for (at, b) in hits {
            let at = at.index(bytes.len());
            bytes[at] = b;
        }
        let mut p = Parser::new(limits());
        let mut sink = |e: Event<'_>| {
            if let Event::Page { block, page, .. } | Event::Zero { block, page } = e {
                // Whatever was hit, a page is always one of a listed block: never more than what the list allows.
                assert!(block < 1024 && page < 64 << 28, "{block} {page}");
            }
            Ok::<_, StreamError>(())
        };
        let whole = p.push(&bytes, &mut sink);
        let mut q = Parser::new(limits());
        let bytewise = bytes.chunks(1).try_for_each(|b| q.push(b, &mut sink));
        prop_assert_eq!(whole, bytewise);
        prop_assert!(q.held_bytes() <= 2 * PAGE_SIZE);
    }

    #[test]
    fn noise_is_refused_at_its_first_bytes(bytes in prop::collection::vec(any::<u8>(), 8..64)) {
        let (seen, r) = parse(&[&bytes]);
        prop_assert!(seen.is_empty());
        prop_assert!(r.is_err());
    }
}

/// What a stream that begins well and goes on with `rest` ends with.
fn refused(rest: impl FnOnce(&mut Composer<'_>)) -> StreamError {
    let setup = setup();
    let mut c = Composer::new(&setup);
    header(&mut c);
    rest(&mut c);
    let bytes = c.into_bytes();
    let whole = parse(&[&bytes]).1.unwrap_err();
    assert_eq!(parse(&bytes.chunks(1).collect::<Vec<_>>()).1.unwrap_err(), whole);
    whole
}

fn be(n: u64) -> [u8; 8] {
    n.to_be_bytes()
}

#[test]
fn each_refusal_has_its_name() {
    use StreamError as E;
    assert_eq!(
        refused(|c| {
            c.raw(&[4]);
        }),
        E::SectionType(4)
    );
    assert_eq!(
        refused(|c| {
            c.raw(&[0]);
        }),
        E::SectionType(0)
    );
    assert_eq!(
        refused(|c| {
            c.ram_start(false);
        }),
        E::SectionType(1)
    );
    assert_eq!(
        refused(|c| {
            c.raw(b"\x02\0\0\0\x09");
        }),
        E::SectionId { got: 9, want: 2 }
    );
    assert_eq!(
        refused(|c| {
            c.part().eos().raw(b"\x7e\0\0\0\x09");
        }),
        E::SectionId { got: 9, want: 2 }
    );
    assert_eq!(
        refused(|c| {
            c.part().eos().raw(b"\x02");
        }),
        E::Footer(2)
    );
    assert_eq!(
        refused(|c| {
            c.command((3, 0), &[]);
        }),
        E::Command { command: 3, len: 0 }
    );
    assert_eq!(
        refused(|c| {
            c.command((2, 0xffff), &[]);
        }),
        E::Command {
            command: 2,
            len: 0xffff
        }
    );
    assert_eq!(
        refused(|c| {
            c.part().raw(&be(0x28)).raw(&[1; 4096]);
        }),
        E::NoBlockYet
    );
    assert_eq!(
        refused(|c| {
            c.part().raw(&be(0x40));
        }),
        E::Xbzrle
    );
    assert_eq!(
        refused(|c| {
            c.part().raw(&be(0x60));
        }),
        E::Xbzrle
    );
    assert_eq!(
        refused(|c| {
            c.part().raw(&be(0x80));
        }),
        E::Flags(0x80)
    );
    assert_eq!(
        refused(|c| {
            c.part().raw(&be(0x200));
        }),
        E::Flags(0x200)
    );
    assert_eq!(
        refused(|c| {
            c.part().raw(&be(0x0a));
        }),
        E::Flags(0x0a)
    );
    assert_eq!(
        refused(|c| {
            c.part().raw(&be(0x1004));
        }),
        E::Flags(4)
    );
    assert_eq!(
        refused(|c| {
            c.part().raw(&be(8)).raw(b"\x03abc").raw(&[1; 4096]);
        }),
        E::UnknownBlock("abc".into())
    );
    assert_eq!(
        refused(|c| {
            c.part().raw(&be(2)).raw(b"\x07pc.bios\x01");
        }),
        E::ZeroByte(1)
    );
    let outside = |offset| E::OutOfBlock {
        block: "pc.bios".into(),
        offset,
        bytes: 64 << 12,
    };
    assert_eq!(
        refused(|c| {
            c.part().page(2, 64, None);
        }),
        outside(64 << 12)
    );
    assert_eq!(
        refused(|c| {
            c.part().page(2, 1 << 51, Some(&[1; 4096]));
        }),
        outside(1 << 63)
    );
    let empty = E::OutOfBlock {
        block: "empty".into(),
        offset: 0,
        bytes: 0,
    };
    assert_eq!(
        refused(|c| {
            c.part().page(1, 0, None);
        }),
        empty
    );
}

/// What a stream with this block list ends with.
fn list_refused(total: u64, blocks: &[(&[u8], u64)]) -> StreamError {
    let setup = setup();
    let mut c = Composer::new(&setup);
    c.header(&setup.config)
        .raw(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04")
        .raw(&be(total | 4));
    for (name, bytes) in blocks {
        c.raw(&[name.len() as u8]).raw(name).raw(&be(*bytes));
    }
    c.end_section();
    parse(&[&c.into_bytes()]).1.unwrap_err()
}

#[test]
fn block_lists_are_bounded() {
    use StreamError as E;
    let page = 4096;
    assert_eq!(
        list_refused(page, &[(b"a", 2 * page)]),
        E::BlockList {
            total: page,
            bytes: 2 * page
        }
    );
    assert!(matches!(
        list_refused(2 * page, &[(b"a", page), (b"a", page)]),
        E::Setup(_)
    ));
    assert!(matches!(list_refused(page, &[(b"", page)]), E::Setup(_)));
    assert!(matches!(
        list_refused(page, &[(b"a", 5), (b"b", page - 5)]),
        E::Setup(_)
    ));
    assert!(matches!(
        list_refused(u64::MAX << 12, &[(b"a", u64::MAX << 12)]),
        E::Setup(_)
    ));
    assert_eq!(list_refused(page, &[(b"\xff", page)]), E::UnknownBlock("\\xff".into()));
    let many: Vec<_> = (0..2000).map(|_| (&b"a"[..], 0)).collect();
    assert!(matches!(list_refused(page, &many), E::TooMuch { .. }));
}

#[test]
fn heads_that_are_not_understood() {
    use StreamError as E;
    let head = |bytes: &[u8]| parse(&[bytes]).1;
    assert_eq!(head(b"QEVN\0\0\0\x03"), Err(E::Magic(*b"QEVN")));
    assert_eq!(head(b"QEVM\0\0\0\x02"), Err(E::Version(2)));
    assert_eq!(head(b"QEVM\0\0\0\x03\x01"), Err(E::NoConfig(1)));
    let config = b"QEVM\0\0\0\x03\x07\0\0\0\x01q";
    let section = |rest: &[u8]| parse(&[&config[..], rest]).1;
    let other = E::Section {
        name: "vfio".into(),
        version: 4,
    };
    assert_eq!(section(b"\x01\0\0\0\x02\x04vfio\0\0\0\0\0\0\0\x04"), Err(other));
    let newer = E::Section {
        name: "ram".into(),
        version: 5,
    };
    assert_eq!(section(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x05"), Err(newer));
    assert_eq!(section(b"\x02\0\0\0\x02"), Err(E::SectionType(2)));
}

#[test]
fn nothing_follows_the_end_and_a_late_byte_is_no_part_of_it() {
    let (bytes, want) = stream(&[vec![]], b"state");
    let (seen, r) = parse(&[&bytes, &[0]]);
    assert_eq!((seen, r), (want, Err(StreamError::Trailing)));
    // In one push the description is not the end of it: the device state goes on.
    let (seen, r) = parse(&[&[&bytes[..], &[0]].concat()]);
    assert_eq!(r, Ok(()));
    assert!(!seen.iter().any(|s| matches!(s, Seen::Complete(_))));
}

#[test]
fn a_device_state_without_end_is_bounded() {
    let (bytes, _) = stream(&[vec![]], &vec![1; 1 << 16]);
    assert!(matches!(
        parse(&[&bytes]).1,
        Err(StreamError::TooMuch {
            what: "device state",
            ..
        })
    ));
}

#[test]
fn an_error_of_the_sink_is_final() {
    #[derive(Debug, PartialEq)]
    enum E {
        Stream(StreamError),
        Full,
    }
    impl From<StreamError> for E {
        fn from(e: StreamError) -> Self {
            Self::Stream(e)
        }
    }
    let (bytes, _) = stream(&[vec![(0, 1, 7)]], b"");
    let mut p = Parser::new(limits());
    let sink: &mut dyn FnMut(Event<'_>) -> Result<(), E> = &mut |e| {
        if matches!(e, Event::Page { .. }) {
            Err(E::Full)
        } else {
            Ok(())
        }
    };
    assert_eq!(p.push(&bytes, sink), Err(E::Full));
    assert_eq!(p.push(&[], sink), Err(E::Stream(StreamError::Failed)));
}

#[test]
fn pages_that_lie_whole_in_the_bytes_are_not_copied() {
    let (bytes, _) = stream(&[vec![(0, 1, 7), (0, 2, 8)]], b"");
    let range = bytes.as_ptr_range();
    let mut p = Parser::new(limits());
    let mut pages = 0;
    p.push(&bytes, &mut |e: Event<'_>| {
        if let Event::Page { data, .. } = e {
            let data: &Page = data;
            assert!(range.contains(&data.as_ptr()));
            pages += 1;
        }
        Ok::<_, StreamError>(())
    })
    .unwrap();
    assert_eq!(pages, 2);
    assert_eq!(p.position(), bytes.len() as u64);
}
