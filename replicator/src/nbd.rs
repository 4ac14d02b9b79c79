//! A client of NBD over a unix socket: as much of it as looking at a disk takes. One request at a time.
//!
//! ```text
//! server  "NBDMAGIC" "IHAVEOPT" flags u16                       client  flags u32
//! client  "IHAVEOPT" option u32 length u32 data                 server  OPT_REPLY u64 option u32 kind u32 length u32 data … until ACK
//! client  REQUEST u32 flags u16 type u16 cookie u64 offset u64 length u32 [data]
//!                                                               server  REPLY u32 error u32 cookie u64 [data]
//! ```
//! Big-endian; the format is that of the NBD project's `doc/proto.md`.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const MAGIC: &[u8; 8] = b"NBDMAGIC";
const OPTION: &[u8; 8] = b"IHAVEOPT";
const OPT_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const REPLY: u32 = 0x6744_6698;
const FIXED_NEWSTYLE: u16 = 1;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_ERROR: u32 = 1 << 31;
const INFO_EXPORT: u16 = 0;
/// An answer to an option is short; a longer one is no NBD.
const INFO_MAX: u32 = 16 << 10;
/// Answers to one option. There are fewer kinds.
const INFOS_MAX: usize = 32;

#[derive(Clone, Copy)]
enum Command {
    Read = 0,
    Write = 1,
    Disconnect = 2,
    Flush = 3,
}

/// An open export.
pub struct Client {
    stream: UnixStream,
    bytes: u64,
    cookie: u64,
}

impl Client {
    /// `timeout`: for each read and write on the socket.
    pub fn connect(path: &Path, export: &str, timeout: Duration) -> io::Result<Self> {
        Self::over(UnixStream::connect(path)?, export, timeout)
    }

    pub fn over(mut stream: UnixStream, export: &str, timeout: Duration) -> io::Result<Self> {
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        let (magic, option): ([u8; 8], [u8; 8]) = (read(&mut stream)?, read(&mut stream)?);
        let flags = u16::from_be_bytes(read(&mut stream)?);
        if magic != *MAGIC || option != *OPTION || flags & FIXED_NEWSTYLE == 0 {
            return Err(wrong("its first words"));
        }
        let name = u32::try_from(export.len()).map_err(|_| wrong("the export's name"))?;
        let mut go = u32::from(FIXED_NEWSTYLE).to_be_bytes().to_vec();
        go.extend_from_slice(OPTION);
        go.extend_from_slice(&OPT_GO.to_be_bytes());
        go.extend_from_slice(&(name + 6).to_be_bytes());
        go.extend_from_slice(&name.to_be_bytes());
        go.extend_from_slice(export.as_bytes());
        // No particular information is asked for.
        go.extend_from_slice(&0_u16.to_be_bytes());
        stream.write_all(&go)?;
        let bytes = opened(&mut stream)?;
        Ok(Self {
            stream,
            bytes,
            cookie: 0,
        })
    }

    /// How large the disk is.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn read(&mut self, at: u64, into: &mut [u8]) -> io::Result<()> {
        self.ask(Command::Read, at, into.len(), &[])?;
        self.stream.read_exact(into)
    }

    /// Returns when the server has it; [`Self::flush`] makes it last.
    pub fn write(&mut self, at: u64, data: &[u8]) -> io::Result<()> {
        self.ask(Command::Write, at, data.len(), data)
    }

    pub fn flush(&mut self) -> io::Result<()> {
        self.ask(Command::Flush, 0, 0, &[])
    }

    fn send(&mut self, command: Command, at: u64, len: usize, data: &[u8]) -> io::Result<()> {
        let len = u32::try_from(len).map_err(|_| wrong("a request's length"))?;
        self.cookie += 1;
        let mut request = REQUEST.to_be_bytes().to_vec();
        request.extend_from_slice(&0_u16.to_be_bytes());
        request.extend_from_slice(&(command as u16).to_be_bytes());
        request.extend_from_slice(&self.cookie.to_be_bytes());
        request.extend_from_slice(&at.to_be_bytes());
        request.extend_from_slice(&len.to_be_bytes());
        request.extend_from_slice(data);
        self.stream.write_all(&request)
    }

    fn ask(&mut self, command: Command, at: u64, len: usize, data: &[u8]) -> io::Result<()> {
        self.send(command, at, len, data)?;
        let magic = u32::from_be_bytes(read(&mut self.stream)?);
        let error = u32::from_be_bytes(read(&mut self.stream)?);
        let cookie = u64::from_be_bytes(read(&mut self.stream)?);
        match (magic, cookie, error) {
            (REPLY, c, 0) if c == self.cookie => Ok(()),
            // Of kind `Other`, unlike the socket's own. The numbers are Linux's.
            (REPLY, c, e) if c == self.cookie => {
                let why = io::Error::from_raw_os_error(e.cast_signed());
                Err(io::Error::other(format!("the NBD server says: {why}")))
            }
            _ => Err(wrong("an answer")),
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // A server that hears nothing more notices too, and complains of it.
        let _ = self.send(Command::Disconnect, 0, 0, &[]);
    }
}

/// What the server says of the export: its size.
fn opened(stream: &mut UnixStream) -> io::Result<u64> {
    let mut bytes = None;
    for _ in 0..INFOS_MAX {
        let magic = u64::from_be_bytes(read(stream)?);
        let option = u32::from_be_bytes(read(stream)?);
        let kind = u32::from_be_bytes(read(stream)?);
        let len = u32::from_be_bytes(read(stream)?);
        if magic != OPT_REPLY || option != OPT_GO || len > INFO_MAX {
            return Err(wrong("its answer to an option"));
        }
        let mut data = vec![0; len as usize];
        stream.read_exact(&mut data)?;
        match kind {
            REP_ACK => return bytes.ok_or_else(|| wrong("its word of the export's size")),
            REP_INFO => {
                let what = data.first_chunk().map(|b| u16::from_be_bytes(*b));
                let size = data.get(2..).and_then(|d| d.first_chunk());
                if let (Some(INFO_EXPORT), Some(size)) = (what, size) {
                    bytes = Some(u64::from_be_bytes(*size));
                }
            }
            e if e & REP_ERROR != 0 => {
                return Err(io::Error::other(format!(
                    "the NBD server refuses the export: {}",
                    String::from_utf8_lossy(&data)
                )));
            }
            _ => {}
        }
    }
    Err(wrong("its many answers to one option"))
}

fn read<const N: usize>(stream: &mut UnixStream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn wrong(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("NBD: {what} can't be right"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server's words, all at once; gives what the client sent.
    fn served(words: &[u8], talk: impl FnOnce(io::Result<Client>)) -> Vec<u8> {
        let (near, mut far) = UnixStream::pair().unwrap();
        far.write_all(words).unwrap();
        far.shutdown(std::net::Shutdown::Write).unwrap();
        talk(Client::over(near, "disk0", Duration::from_secs(5)));
        let mut sent = Vec::new();
        // Words that the client did not wait for reset the connection.
        let _ = far.read_to_end(&mut sent);
        sent
    }

    fn answer(kind: u32, data: &[u8]) -> Vec<u8> {
        let mut a = OPT_REPLY.to_be_bytes().to_vec();
        a.extend_from_slice(&OPT_GO.to_be_bytes());
        a.extend_from_slice(&kind.to_be_bytes());
        a.extend_from_slice(&(data.len() as u32).to_be_bytes());
        a.extend_from_slice(data);
        a
    }

    fn hello() -> Vec<u8> {
        let mut size = INFO_EXPORT.to_be_bytes().to_vec();
        size.extend_from_slice(&7000_u64.to_be_bytes());
        size.extend_from_slice(&[0, 1]);
        // Something unasked for before it.
        [
            MAGIC,
            OPTION,
            &[0, 3][..],
            &answer(REP_INFO, &[0, 3, 1]),
            &answer(REP_INFO, &size),
            &answer(REP_ACK, &[]),
        ]
        .concat()
    }

    fn reply(error: u32, cookie: u64, data: &[u8]) -> Vec<u8> {
        [
            &REPLY.to_be_bytes()[..],
            &error.to_be_bytes(),
            &cookie.to_be_bytes(),
            data,
        ]
        .concat()
    }

    #[test]
    fn what_is_read_is_what_the_server_sent() {
        let words = [hello(), reply(0, 1, b"abcd"), reply(5, 2, &[])].concat();
        let sent = served(&words, |client| {
            let (mut client, mut data) = (client.unwrap(), [0; 4]);
            assert_eq!(client.bytes(), 7000);
            client.read(512, &mut data).unwrap();
            assert_eq!(&data, b"abcd");
            let refused = client.write(0, b"xy").unwrap_err();
            assert!(
                refused.kind() == io::ErrorKind::Other && refused.to_string().contains("os error 5"),
                "{refused}"
            );
        });
        let go = sent.get(4..12);
        assert_eq!(go, Some(OPTION.as_slice()));
        let first = sent.windows(4).position(|w| w == REQUEST.to_be_bytes()).unwrap();
        assert_eq!(
            sent[first + 16..first + 28],
            [0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 4],
            "offset and length"
        );
    }

    #[test]
    fn a_server_that_talks_nonsense_is_an_error() {
        let refused = [MAGIC, OPTION, &[0, 3][..], &answer(REP_ERROR | 6, b"no such export")].concat();
        served(&refused, |c| {
            assert!(c.err().unwrap().to_string().contains("no such export"))
        });
        let huge = [
            &OPT_REPLY.to_be_bytes()[..],
            &[0, 0, 0, 7, 0, 0, 0, 3, 255, 255, 255, 255],
        ]
        .concat();
        for words in [
            b"HTTP/1.1 400 Bad Request".to_vec(),
            [MAGIC, OPTION, &[0, 0][..]].concat(),
            [MAGIC, OPTION, &[0, 3][..], &huge].concat(),
            [MAGIC, OPTION, &[0, 3][..], &answer(REP_ACK, &[])].concat(),
            hello().get(..40).unwrap().to_vec(),
        ] {
            served(&words, |c| assert!(c.is_err(), "{words:?}"));
        }
        served(&[hello(), reply(0, 9, &[])].concat(), |c| {
            assert!(c.unwrap().flush().is_err(), "another one's answer");
        });
    }
}
