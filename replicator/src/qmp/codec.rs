//! QMP's lines, without a socket: bytes in, messages out. The peer is a process that a guest may have taken over, so every
//! line is bounded and nothing of its content is trusted.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// Longest line taken. The largest known answer, the schema, has a quarter of a megabyte.
pub const LINE_MAX: usize = 8 << 20;

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CodecError {
    #[error("a line of more than {LINE_MAX} bytes")]
    TooLong,
    #[error("{0}")]
    Json(String),
    #[error("a {what} without {missing}")]
    Incomplete { what: &'static str, missing: &'static str },
    #[error("a line that is no greeting, reply or event")]
    Unknown,
}

/// QEMU's version, as the greeting has it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct Version {
    pub major: u32,
    pub minor: u32,
    pub micro: u32,
}

impl Version {
    /// The first QEMU with `switchover-ack`, which is what holds a migration open.
    pub const OLDEST: Self = Self {
        major: 8,
        minor: 1,
        micro: 0,
    };
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// What QEMU says.
#[derive(Clone, PartialEq, Debug)]
pub enum Message {
    Greeting(Version),
    Return {
        id: Option<u64>,
        value: Value,
    },
    /// `id` is absent if QEMU could not even read the command.
    Error {
        id: Option<u64>,
        class: String,
        desc: String,
    },
    Event {
        name: String,
        data: Value,
        /// QEMU's own clock, microseconds since 1970; 0 if it could not read it.
        unix_us: i64,
    },
}

/// An event as the client keeps it.
#[derive(Clone, PartialEq, Debug)]
pub struct Event {
    pub name: String,
    pub data: Value,
    pub unix_us: i64,
    pub arrived: std::time::Instant,
}

impl Event {
    /// `data.status` of `MIGRATION` and its like.
    pub fn status(&self) -> Option<&str> {
        self.data.get("status").and_then(Value::as_str)
    }
}

/// One command as a line.
pub fn encode(command: &str, arguments: Value, id: u64) -> Vec<u8> {
    let mut object = json!({ "execute": command, "id": id });
    if let (Some(map), false) = (object.as_object_mut(), arguments.is_null()) {
        map.insert("arguments".into(), arguments);
    }
    let mut line = object.to_string().into_bytes();
    line.push(b'\n');
    line
}

/// Cuts lines out of what a socket delivers, whatever its pieces are.
#[derive(Default, Debug)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// Bytes of `buffer` that hold no newline for sure.
    scanned: usize,
}

impl Decoder {
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole message, `None` if more bytes are needed. After an error the connection is of no use.
    pub fn next_message(&mut self) -> Result<Option<Message>, CodecError> {
        loop {
            let Some(at) = self.buffer.iter().skip(self.scanned).position(|b| *b == b'\n') else {
                self.scanned = self.buffer.len();
                return if self.buffer.len() > LINE_MAX {
                    Err(CodecError::TooLong)
                } else {
                    Ok(None)
                };
            };
            let rest = self.buffer.split_off(self.scanned + at + 1);
            let line = std::mem::replace(&mut self.buffer, rest);
            self.scanned = 0;
            if line.len() > LINE_MAX {
                return Err(CodecError::TooLong);
            }
            if !line.trim_ascii().is_empty() {
                return decode(&line).map(Some);
            }
        }
    }
}

/// Understands one line.
pub fn decode(line: &[u8]) -> Result<Message, CodecError> {
    let value: Map<String, Value> = serde_json::from_slice(line).map_err(|e| CodecError::Json(e.to_string()))?;
    let id = value.get("id").and_then(Value::as_u64);
    if let Some(greeting) = value.get("QMP") {
        return version(greeting).map(Message::Greeting);
    }
    if let Some(name) = value.get("event") {
        return event(name, &value);
    }
    if let Some(error) = value.get("error") {
        let text = |key| error.get(key).and_then(Value::as_str).map(str::to_owned);
        return Ok(Message::Error {
            id,
            class: text("class").ok_or(CodecError::Incomplete {
                what: "error",
                missing: "class",
            })?,
            desc: text("desc").ok_or(CodecError::Incomplete {
                what: "error",
                missing: "desc",
            })?,
        });
    }
    let mut value = value;
    match value.remove("return") {
        Some(value) => Ok(Message::Return { id, value }),
        None => Err(CodecError::Unknown),
    }
}

fn version(greeting: &Value) -> Result<Version, CodecError> {
    let part = |name: &'static str| {
        greeting
            .pointer(&format!("/version/qemu/{name}"))
            .and_then(Value::as_u64)
            .and_then(|n| u32::try_from(n).ok())
            .ok_or(CodecError::Incomplete {
                what: "greeting",
                missing: name,
            })
    };
    Ok(Version {
        major: part("major")?,
        minor: part("minor")?,
        micro: part("micro")?,
    })
}

fn event(name: &Value, value: &Map<String, Value>) -> Result<Message, CodecError> {
    let name = name.as_str().ok_or(CodecError::Incomplete {
        what: "event",
        missing: "a name",
    })?;
    let time = |key| value.get("timestamp").and_then(|t| t.get(key)).and_then(Value::as_i64);
    let (seconds, micros) = time("seconds")
        .zip(time("microseconds"))
        .ok_or(CodecError::Incomplete {
            what: "event",
            missing: "a timestamp",
        })?;
    // QEMU writes -1 for both if its host has no time to tell.
    let unix_us = if seconds < 0 {
        0
    } else {
        seconds.saturating_mul(1_000_000).saturating_add(micros)
    };
    let data = value.get("data").cloned().unwrap_or(Value::Null);
    Ok(Message::Event {
        name: name.to_owned(),
        data,
        unix_us,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "Debian"}, "capabilities": ["oob"]}}"#;

    #[test]
    fn understands_the_four_kinds_of_lines() {
        assert_eq!(
            decode(GREETING.as_bytes()),
            Ok(Message::Greeting(Version {
                major: 10,
                minor: 0,
                micro: 2
            }))
        );
        assert_eq!(
            decode(br#"{"return": {"status": "running"}, "id": 7}"#),
            Ok(Message::Return {
                id: Some(7),
                value: json!({"status": "running"})
            })
        );
        assert_eq!(
            decode(br#"{"id": 8, "error": {"class": "GenericError", "desc": "no"}}"#),
            Ok(Message::Error {
                id: Some(8),
                class: "GenericError".into(),
                desc: "no".into()
            })
        );
        let event = br#"{"timestamp": {"seconds": 1700000000, "microseconds": 42}, "event": "STOP"}"#;
        assert_eq!(
            decode(event),
            Ok(Message::Event {
                name: "STOP".into(),
                data: Value::Null,
                unix_us: 1_700_000_000_000_042
            })
        );
    }

    #[test]
    fn what_is_missing_is_named() {
        let error = |line: &str| decode(line.as_bytes()).unwrap_err().to_string();
        assert!(error(r#"{"QMP": {}}"#).contains("major"));
        assert!(error(r#"{"event": "STOP"}"#).contains("timestamp"));
        assert!(error(r#"{"error": {"class": "X"}}"#).contains("desc"));
        assert!(error("[1]").contains("map"), "{}", error("[1]"));
        assert_eq!(decode(b"{}"), Err(CodecError::Unknown));
        // A version that does not fit is no version.
        assert!(decode(GREETING.replace("10", "4294967296").as_bytes()).is_err());
    }

    #[test]
    fn a_line_without_end_is_refused_and_so_is_deep_nesting() {
        let mut decoder = Decoder::default();
        decoder.push(&vec![b' '; LINE_MAX]);
        assert_eq!(decoder.next_message(), Ok(None));
        decoder.push(b"  ");
        assert_eq!(decoder.next_message(), Err(CodecError::TooLong));

        let deep = format!(r#"{{"return": {}1{}}}"#, "[".repeat(100_000), "]".repeat(100_000));
        assert!(matches!(decode(deep.as_bytes()), Err(CodecError::Json(_))));
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(cuts in prop::collection::vec(1usize..40, 0..30)) {
            let text = format!("{GREETING}\r\n\r\n{{\"return\": {{}}, \"id\": 1}}\r\n{{\"return\": [1], \"id\": 2}}\r\n");
            let mut decoder = Decoder::default();
            let mut left = text.as_bytes();
            let mut seen = Vec::new();
            for cut in cuts.into_iter().chain([text.len()]) {
                let (head, tail) = left.split_at(cut.min(left.len()));
                decoder.push(head);
                left = tail;
                while let Some(m) = decoder.next_message().unwrap() {
                    seen.push(m);
                }
            }
            prop_assert_eq!(seen.len(), 3);
            prop_assert_eq!(&seen[2], &Message::Return { id: Some(2), value: json!([1]) });
        }

        #[test]
        fn hostile_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let mut decoder = Decoder::default();
            decoder.push(&bytes);
            decoder.push(b"\n");
            while let Ok(Some(_)) = decoder.next_message() {}
        }

        #[test]
        fn commands_are_one_line_whatever_they_say(command in ".{0,40}", argument in ".{0,60}", id in any::<u64>()) {
            let line = encode(&command, json!({ "x": argument }), id);
            prop_assert_eq!(line.iter().filter(|b| **b == b'\n').count(), 1);
            let back: Value = serde_json::from_slice(&line).unwrap();
            prop_assert_eq!(&back["execute"], &json!(command));
            prop_assert_eq!(&back["arguments"]["x"], &json!(argument));
            prop_assert_eq!(&back["id"], &json!(id));
        }
    }
}
