//! TOML files become typed configuration here. An error names the file, the key and the reason; unknown keys are errors
//! (the types say `deny_unknown_fields`).

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("{}: {source}", .file.display())]
    Read { file: PathBuf, source: std::io::Error },
    #[error("{}: {reason}", .file.display())]
    Syntax { file: PathBuf, reason: String },
    #[error("{}: {key}: {reason}", .file.display())]
    Key { file: PathBuf, key: String, reason: String },
}

/// What a value can be wrong about beyond its type.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Invalid {
    /// Dotted: `policy.threshold`.
    pub key: String,
    pub reason: String,
}

impl Invalid {
    pub fn new(key: impl Into<String>, reason: impl Into<String>) -> Self {
        Self {
            key: key.into(),
            reason: reason.into(),
        }
    }
}

/// A configuration that can judge itself once its types are right.
pub trait Check {
    fn check(&self) -> Result<(), Invalid>;
}

/// Reads, decodes and checks a file.
pub fn load<T: DeserializeOwned + Check>(file: &Path) -> Result<T, ConfigError> {
    let text = std::fs::read_to_string(file).map_err(|source| ConfigError::Read {
        file: file.to_owned(),
        source,
    })?;
    parse(file, &text)
}

/// The same for a text that was read already; `file` is only for the message.
pub fn parse<T: DeserializeOwned + Check>(file: &Path, text: &str) -> Result<T, ConfigError> {
    let syntax = |e: toml::de::Error| ConfigError::Syntax {
        file: file.to_owned(),
        reason: one_line(&e, text),
    };
    let de = toml::Deserializer::parse(text).map_err(syntax)?;
    let value: T = serde_path_to_error::deserialize(de).map_err(|e| {
        let key = e.path().to_string();
        let reason = one_line(e.inner(), text);
        match key.as_str() {
            "." => ConfigError::Syntax {
                file: file.to_owned(),
                reason,
            },
            _ => ConfigError::Key {
                file: file.to_owned(),
                key,
                reason,
            },
        }
    })?;
    value.check().map_err(|i| ConfigError::Key {
        file: file.to_owned(),
        key: i.key,
        reason: i.reason,
    })?;
    Ok(value)
}

/// The message without the source excerpt that toml draws over several lines, with the line's number instead.
fn one_line(e: &toml::de::Error, text: &str) -> String {
    let message = e.message().trim().replace('\n', ", ");
    match e.span().and_then(|s| text.get(..s.start)) {
        Some(before) => format!("{message} (line {})", before.matches('\n').count() + 1),
        None => message,
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize, Debug)]
    #[serde(deny_unknown_fields)]
    struct Outer {
        listen: String,
        policy: Inner,
    }

    #[derive(Deserialize, Debug)]
    #[serde(deny_unknown_fields)]
    struct Inner {
        threshold: f64,
    }

    impl Check for Outer {
        fn check(&self) -> Result<(), Invalid> {
            match (0.0..=1.0).contains(&self.policy.threshold) {
                true => Ok(()),
                false => Err(Invalid::new(
                    "policy.threshold",
                    format!("{} is not between 0 and 1", self.policy.threshold),
                )),
            }
        }
    }

    fn error(text: &str) -> String {
        parse::<Outer>(Path::new("rps.toml"), text).unwrap_err().to_string()
    }

    #[test]
    fn errors_name_file_key_and_reason() {
        let good = "listen = 'x'\n[policy]\nthreshold = 0.5\n";
        assert_eq!(parse::<Outer>(Path::new("f"), good).unwrap().listen, "x");
        let e = error("listen = 'x'\n[policy]\nthreshold = 'high'\n");
        assert!(
            e.starts_with("rps.toml: policy.threshold: ") && e.contains("line 3"),
            "{e}"
        );
        let e = error("listen = 'x'\n[policy]\nthreshold = 0.5\nthreshhold = 1\n");
        assert!(e.starts_with("rps.toml: policy") && e.contains("threshhold"), "{e}");
        let e = error("listen = 'x'\n[policy]\nthreshold = 7\n");
        assert_eq!(e, "rps.toml: policy.threshold: 7 is not between 0 and 1");
        let e = error("listen = \n");
        assert!(e.starts_with("rps.toml: ") && e.contains("line 1"), "{e}");
        let e = error("[policy]\nthreshold = 0.5\n");
        assert!(e.contains("listen"), "{e}");
        let e = load::<Outer>(Path::new("/nonexistent/rps.toml"))
            .unwrap_err()
            .to_string();
        assert!(e.starts_with("/nonexistent/rps.toml: "), "{e}");
    }
}
