//! `umbra pki`: a certificate authority for the replicators' link, in a folder of files. For trying Umbra out, and for sites
//! that have no CA of their own: whoever holds `ca.key` can be any host.

use std::fs::OpenOptions;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use jiff::{Span, Timestamp, tz::TimeZone};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, date_time_ymd,
};
use serde::Serialize;
use umbra_api::HostId;

/// Valid from so long before its making on, for hosts whose clock is behind.
const BACKDATED_DAYS: i64 = 1;
const CA_DAYS: i64 = 3650;

const CA_CERT: &str = "ca.crt";
const CA_KEY: &str = "ca.key";

#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", .file.display())]
pub struct PkiError {
    file: PathBuf,
    reason: String,
}

fn about(file: &Path) -> impl Fn(&dyn std::fmt::Display) -> PkiError + '_ {
    move |reason| PkiError {
        file: file.to_owned(),
        reason: reason.to_string(),
    }
}

/// What was written.
#[derive(Serialize, Debug)]
pub struct Made {
    pub cert: PathBuf,
    pub key: PathBuf,
}

/// Makes `dir` (0700) if need be, and a CA in it.
pub fn init(dir: &Path, now: Timestamp) -> Result<Made, PkiError> {
    let wrong = about(dir);
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|e| wrong(&e))?;
    let mut params = validity(now, CA_DAYS).map_err(|e| wrong(&e))?;
    // Two CAs of one name would be hard to tell apart in an error.
    let mark = uuid::Uuid::new_v4().simple().to_string();
    let name = format!("Umbra CA {}", mark.get(..8).unwrap_or_default());
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate().map_err(|e| wrong(&e))?;
    let secret = key.serialize_pem();
    let ca = CertifiedIssuer::self_signed(params, key).map_err(|e| wrong(&e))?;
    write(dir.join(CA_CERT), &ca.pem(), dir.join(CA_KEY), &secret)
}

/// A certificate of the CA in `dir` for `host`, to present and to accept connections with.
pub fn issue(dir: &Path, host: &HostId, days: i64, now: Timestamp) -> Result<Made, PkiError> {
    let (cert_file, key_file) = (dir.join(CA_CERT), dir.join(CA_KEY));
    let read = |file: &Path| std::fs::read_to_string(file).map_err(|e| about(file)(&e));
    let key = KeyPair::from_pem(&read(&key_file)?).map_err(|e| about(&key_file)(&e))?;
    let ca = Issuer::from_ca_cert_pem(&read(&cert_file)?, key).map_err(|e| about(&cert_file)(&e))?;

    let wrong = about(dir);
    let mut params = validity(now, days).map_err(|e| wrong(&e))?;
    let named = CertificateParams::new(vec![host.to_string()]).map_err(|e| wrong(&e))?;
    params.subject_alt_names = named.subject_alt_names;
    params.distinguished_name.push(DnType::CommonName, host.as_str());
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let key = KeyPair::generate().map_err(|e| wrong(&e))?;
    let cert = params.signed_by(&key, &ca).map_err(|e| wrong(&e))?;
    let file = |end: &str| dir.join(format!("{host}.{end}"));
    write(file("crt"), &cert.pem(), file("key"), &key.serialize_pem())
}

/// Whole days, since rcgen takes a date.
fn validity(now: Timestamp, days: i64) -> Result<CertificateParams, jiff::Error> {
    let today = now.to_zoned_datetime(TimeZone::UTC).date();
    let date = |offset: i64| -> Result<_, jiff::Error> {
        let d = today.checked_add(Span::new().try_days(offset)?)?;
        Ok(date_time_ymd(i32::from(d.year()), d.month() as u8, d.day() as u8))
    };
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.not_before = date(-BACKDATED_DAYS)?;
    params.not_after = date(days)?;
    Ok(params)
}

/// Both files or none, only readable by their owner, and never over one that is there.
fn write(cert: PathBuf, cert_pem: &str, key: PathBuf, key_pem: &str) -> Result<Made, PkiError> {
    create(&key, key_pem)?;
    if let Err(e) = create(&cert, cert_pem) {
        // It is the one that was just made.
        let _ = std::fs::remove_file(&key);
        return Err(e);
    }
    Ok(Made { cert, key })
}

fn create(file: &Path, text: &str) -> Result<(), PkiError> {
    let opened = OpenOptions::new().write(true).create_new(true).mode(0o600).open(file);
    opened
        .and_then(|mut f| f.write_all(text.as_bytes()).and_then(|()| f.sync_all()))
        .map_err(|e| match e.kind() {
            ErrorKind::AlreadyExists => about(file)(&"it is there already and is not overwritten"),
            _ => about(file)(&e),
        })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn host(name: &str) -> HostId {
        name.parse().unwrap()
    }

    #[test]
    fn what_is_made_is_private_and_stays() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path().join("pki");
        let now: Timestamp = "2026-02-28T12:00:00Z".parse().unwrap();
        let ca = init(&dir, now).unwrap();
        let a = issue(&dir, &host("kvm-a"), 397, now).unwrap();
        assert_eq!(a.cert, dir.join("kvm-a.crt"));
        for file in [&ca.cert, &ca.key, &a.cert, &a.key] {
            let mode = std::fs::metadata(file).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{}", file.display());
        }
        let before = std::fs::read(&ca.key).unwrap();
        let e = init(&dir, now).unwrap_err().to_string();
        assert!(e.ends_with("ca.key: it is there already and is not overwritten"), "{e}");
        let e = issue(&dir, &host("kvm-a"), 397, now).unwrap_err().to_string();
        assert!(e.contains("kvm-a.key: it is there already"), "{e}");
        assert_eq!(std::fs::read(&ca.key).unwrap(), before);
        // A half that is there blocks the other half too.
        std::fs::remove_file(&a.key).unwrap();
        let e = issue(&dir, &host("kvm-a"), 397, now).unwrap_err().to_string();
        assert!(e.contains("kvm-a.crt: it is there already") && !a.key.exists(), "{e}");
    }

    #[test]
    fn a_missing_or_foreign_ca_is_named() {
        let tmp = tempfile::tempdir().unwrap();
        let e = issue(tmp.path(), &host("a"), 1, Timestamp::UNIX_EPOCH)
            .unwrap_err()
            .to_string();
        assert!(e.contains("ca.key: No such file"), "{e}");
        init(tmp.path(), Timestamp::now()).unwrap();
        std::fs::write(tmp.path().join("ca.crt"), "nonsense").unwrap();
        let e = issue(tmp.path(), &host("a"), 1, Timestamp::now())
            .unwrap_err()
            .to_string();
        assert!(e.contains("ca.crt: "), "{e}");
    }
}
