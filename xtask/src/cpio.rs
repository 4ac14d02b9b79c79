//! A `newc` archive, the format of an initramfs (Linux: Documentation/driver-api/early-userspace/buffer-format.rst). Written here
//! because thirty lines do it without the `cpio` tool, and make the device node without being root.

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    pub fn directory(&mut self, name: &str) {
        self.entry(name, DIRECTORY, &[], (0, 0));
    }

    pub fn file(&mut self, name: &str, data: &[u8]) {
        self.entry(name, PROGRAM, data, (0, 0));
    }

    pub fn device(&mut self, name: &str, major: u32, minor: u32) {
        self.entry(name, CHARACTER_DEVICE, &[], (major, minor));
    }

    /// Ends the archive. The same entries give the same bytes: no times and no inode numbers of this machine are in it.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[], (0, 0));
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, data: &[u8], (major, minor): (u32, u32)) {
        self.entries += 1;
        // inode, mode, uid, gid, links, mtime, size, device (2), special device (2), name's size with its NUL, checksum
        let size = data.len() as u32;
        let fields = [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            size,
            0,
            0,
            major,
            minor,
            name.len() as u32 + 1,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_the_trailer_is_last() {
        let mut archive = Archive::default();
        archive.directory("dev");
        archive.device("dev/console", 5, 1);
        archive.file("init", b"hello");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        let heads: Vec<_> = (0..bytes.len() - 6)
            .filter(|at| &bytes[*at..*at + 6] == b"070701")
            .collect();
        assert_eq!(heads.len(), 4);
        assert!(heads.iter().all(|at| at % 4 == 0));
        let text = |at: usize, len: usize| String::from_utf8_lossy(&bytes[at..at + len]).into_owned();
        let init = heads[2];
        assert_eq!(
            (text(init + 54, 8), text(init + 110, 5)),
            ("00000005".into(), "init\0".into())
        );
        assert_eq!(text(heads[3] + 110, 10), "TRAILER!!!");
    }
}
