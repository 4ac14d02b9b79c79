//! QEMU's option strings, `driver,key=value,flag=on`, and their JSON form, read and written alike.
//!
//! A comma within a value is doubled. The first part may omit its key (`tap,id=n0` is `type=tap`), which the option's
//! definition in QEMU decides: callers name it. A part without `=` elsewhere is a flag: `server` means `server=on`, `noserver`
//! means `server=off`; it is kept as it was written and looked up under both spellings.

use serde_json::{Map, Value};

#[derive(Clone, PartialEq, Debug)]
pub enum Opts {
    Pairs(Vec<Pair>),
    Json(Map<String, Value>),
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pair {
    pub key: String,
    /// `None` is a bare flag.
    pub value: Option<String>,
    /// The key was implied: written without it.
    implied: bool,
}

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{text:?} is no option string: {reason}")]
pub struct OptsError {
    pub text: String,
    pub reason: String,
}

impl Opts {
    pub fn parse(text: &str, implied: Option<&str>) -> Result<Self, OptsError> {
        if text.trim_start().starts_with('{') {
            return serde_json::from_str(text).map(Self::Json).map_err(|e| OptsError {
                text: text.to_owned(),
                reason: e.to_string(),
            });
        }
        let mut pairs = Vec::new();
        for (n, part) in split_commas(text).into_iter().enumerate() {
            pairs.push(match (part.split_once('='), n, implied) {
                // A path may hold '=': a key does not hold '/'.
                (Some((key, value)), ..) if !key.contains('/') => Pair {
                    key: key.to_owned(),
                    value: Some(value.to_owned()),
                    implied: false,
                },
                (_, 0, Some(key)) => Pair {
                    key: key.to_owned(),
                    value: Some(part),
                    implied: true,
                },
                _ => Pair {
                    key: part,
                    value: None,
                    implied: false,
                },
            });
        }
        Ok(Self::Pairs(pairs))
    }

    /// The value under `key`; nested JSON members by dots. Booleans read `on` and `off`.
    pub fn get(&self, key: &str) -> Option<String> {
        match self {
            // As in QEMU, the last one counts.
            Self::Pairs(pairs) => pairs.iter().rev().find_map(|p| p.read(key)),
            Self::Json(map) => {
                let mut parts = key.split('.');
                let mut value = map.get(parts.next()?)?;
                for part in parts {
                    value = value.get(part)?;
                }
                scalar(value)
            }
        }
    }

    /// Whether a switch is on.
    pub fn is_on(&self, key: &str) -> bool {
        matches!(self.get(key).as_deref(), Some("on" | "yes" | "true" | "y"))
    }

    /// Takes `key` out and returns what it was.
    pub fn remove(&mut self, key: &str) -> Option<String> {
        let was = self.get(key);
        match self {
            Self::Pairs(pairs) => pairs.retain(|p| p.read(key).is_none()),
            Self::Json(map) => {
                map.remove(key);
            }
        }
        was
    }

    /// Sets `key`, in its place if it is there, else at the end.
    pub fn set(&mut self, key: &str, value: &str) {
        match self {
            Self::Json(map) => {
                map.insert(key.to_owned(), Value::String(value.to_owned()));
            }
            Self::Pairs(pairs) => match pairs.iter_mut().find(|p| p.read(key).is_some()) {
                Some(pair) => {
                    pair.key = key.to_owned();
                    pair.value = Some(value.to_owned());
                }
                None => pairs.push(Pair {
                    key: key.to_owned(),
                    value: Some(value.to_owned()),
                    implied: false,
                }),
            },
        }
    }

    /// The same in the comma form, JSON's members flattened to dotted keys.
    pub fn into_pairs(self) -> Vec<Pair> {
        match self {
            Self::Pairs(pairs) => pairs,
            Self::Json(map) => {
                let mut out = Vec::new();
                flatten("", &Value::Object(map), &mut out);
                out
            }
        }
    }

    /// As QEMU reads it.
    pub fn render(&self) -> String {
        match self {
            Self::Pairs(pairs) => pairs.iter().map(Pair::render).collect::<Vec<_>>().join(","),
            Self::Json(map) => Value::Object(map.clone()).to_string(),
        }
    }

    /// Every scalar value, wherever it stands: to look for references to an id.
    pub fn values(&self) -> Vec<String> {
        self.clone().into_pairs().into_iter().filter_map(|p| p.value).collect()
    }
}

impl Pair {
    pub fn new(key: &str, value: &str) -> Self {
        Self {
            key: key.to_owned(),
            value: Some(value.to_owned()),
            implied: false,
        }
    }

    fn read(&self, key: &str) -> Option<String> {
        match &self.value {
            Some(value) if self.key == key => Some(value.clone()),
            None if self.key == key => Some("on".into()),
            None if self.key.strip_prefix("no") == Some(key) => Some("off".into()),
            _ => None,
        }
    }

    pub fn render(&self) -> String {
        match &self.value {
            None => self.key.clone(),
            Some(value) if self.implied => escape(value),
            Some(value) => format!("{}={}", self.key, escape(value)),
        }
    }
}

/// Doubles the commas of a value.
pub fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

fn split_commas(text: &str) -> Vec<String> {
    let mut parts = Vec::new();
    let mut part = String::new();
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            ',' if chars.peek() == Some(&',') => {
                chars.next();
                part.push(',');
            }
            ',' => parts.push(std::mem::take(&mut part)),
            c => part.push(c),
        }
    }
    if !part.is_empty() || parts.is_empty() {
        parts.push(part);
    }
    parts
}

fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(s) => Some(s.clone()),
        Value::Bool(true) => Some("on".into()),
        Value::Bool(false) => Some("off".into()),
        Value::Number(n) => Some(n.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

fn flatten(prefix: &str, value: &Value, out: &mut Vec<Pair>) {
    let key = |name: &str| {
        if prefix.is_empty() {
            name.to_owned()
        } else {
            format!("{prefix}.{name}")
        }
    };
    match value {
        Value::Object(map) => map.iter().for_each(|(name, v)| flatten(&key(name), v, out)),
        Value::Array(items) => items
            .iter()
            .enumerate()
            .for_each(|(n, v)| flatten(&key(&n.to_string()), v, out)),
        other => out.extend(scalar(other).map(|v| Pair::new(prefix, &v))),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pairs(text: &str) -> Opts {
        Opts::parse(text, Some("type")).unwrap()
    }

    #[test]
    fn reads_what_qemu_reads() {
        let o = pairs("tap,id=n0,ifname=t0,script=no,server,nowait");
        assert_eq!(o.get("type").as_deref(), Some("tap"));
        assert_eq!(o.get("ifname").as_deref(), Some("t0"));
        assert!(o.is_on("server") && !o.is_on("wait"));
        assert_eq!(o.get("wait").as_deref(), Some("off"));
        assert_eq!(o.render(), "tap,id=n0,ifname=t0,script=no,server,nowait");
        assert_eq!(pairs("/a,,b=c,server=on").get("type").as_deref(), Some("/a,b=c"));
        assert_eq!(pairs("a=1,a=2").get("a").as_deref(), Some("2"));
    }

    #[test]
    fn json_reads_and_writes_the_same_way() {
        let mut o = pairs(r#"{"driver":"file","read-only":true,"cache":{"direct":false},"size":4096}"#);
        assert!(o.is_on("read-only") && !o.is_on("cache.direct"));
        assert_eq!(o.get("size").as_deref(), Some("4096"));
        assert_eq!(o.remove("driver").as_deref(), Some("file"));
        o.set("id", "x");
        assert_eq!(o.get("id").as_deref(), Some("x"));
        let flat: Vec<_> = o.into_pairs().iter().map(Pair::render).collect();
        assert_eq!(flat, ["cache.direct=off", "id=x", "read-only=on", "size=4096"]);
        assert!(Opts::parse("{nonsense", None).is_err());
    }

    #[test]
    fn set_and_remove_keep_the_order() {
        let mut o = pairs("tap,fd=3,id=n0,nowait");
        o.set("wait", "off");
        o.remove("fd");
        o.set("ifname", "a,b");
        assert_eq!(o.render(), "tap,id=n0,wait=off,ifname=a,,b");
    }

    proptest! {
        #[test]
        fn values_survive_writing_and_reading(values in prop::collection::vec("[ -~]{0,12}", 1..6)) {
            let mut o = pairs("first");
            for (n, value) in values.iter().enumerate() {
                o.set(&format!("k{n}"), value);
            }
            let back = pairs(&o.render());
            for (n, value) in values.iter().enumerate() {
                prop_assert_eq!(back.get(&format!("k{n}")), Some(value.clone()));
            }
        }

        #[test]
        fn no_text_panics(text in ".{0,60}") {
            if let Ok(o) = Opts::parse(&text, Some("x")) {
                o.get("a.b");
                o.render();
                o.values();
            }
        }
    }
}
