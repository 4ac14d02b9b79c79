//! The return path: what the destination of a migration tells its source, on the same socket.
//!
//! ```text
//! message   type be16   length be16   payload[length]
//! ```

const SHUT: u16 = 1;
const PONG: u16 = 2;
const SWITCHOVER_ACK: u16 = 7;

/// Answers PING. The source closes a migration whose PINGs nobody answers.
pub fn pong(value: u32) -> [u8; 8] {
    with_u32(PONG, value)
}

/// Ends the migration. 0: the destination has everything, and the source ends in `postmigrate`. Anything else: it failed,
/// and the source runs on by itself.
pub fn shut(value: u32) -> [u8; 8] {
    with_u32(SHUT, value)
}

/// Lets the source end its pre-copy as soon as it converges. Withheld, it iterates for as long as wanted.
pub fn switchover_ack() -> [u8; 4] {
    let [a, b] = SWITCHOVER_ACK.to_be_bytes();
    [a, b, 0, 0]
}

fn with_u32(kind: u16, value: u32) -> [u8; 8] {
    let [a, b] = kind.to_be_bytes();
    let [v0, v1, v2, v3] = value.to_be_bytes();
    [a, b, 0, 4, v0, v1, v2, v3]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts() {
        assert_eq!(pong(0x0102_0304), [0, 2, 0, 4, 1, 2, 3, 4]);
        assert_eq!(shut(0), [0, 1, 0, 4, 0, 0, 0, 0]);
        assert_eq!(switchover_ack(), [0, 7, 0, 0]);
    }
}
