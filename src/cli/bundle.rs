//! Job: the command that writes a support bundle.
//! Input: which sidecar, a path. Output: one .tar.gz with text files.
//! Edge: writes one file, or standard output.
//! Always true: the file is this user's alone, and none is ever written over; a terminal is sent no archive.

use super::sidecar::Sidecar;
use super::{Failure, say, say_all, say_json};
use crate::admin::bundle::{self, BundleFile};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::json;
use std::fs::OpenOptions;
use std::io::{self, IsTerminal, Write, stdout};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use time::OffsetDateTime;

/// Of a bundle.
const HOLDS: &str = "holds no key, no value and no secret, but names of hosts, links and prefixes";

pub(super) fn bundle(sidecar: &Sidecar, out: Option<&Path>) -> Result<(), Failure> {
    let name = format!("etcd-ferry-{}-{}", sidecar.node()?, stamp(OffsetDateTime::now_utc()));
    let path = out.map_or_else(|| PathBuf::from(format!("{name}.tar.gz")), Path::to_owned);
    let to_stdout = path.as_os_str() == "-";
    if to_stdout && stdout().is_terminal() {
        return Err(Failure::Failed(
            "the bundle is an archive: redirect it into a file, or leave --out away".to_owned(),
        ));
    }
    let files = sidecar.ask(async |connection| bundle::bundle(&connection).await)?;
    let unwritten = |e: io::Error| {
        let shown = path.display();
        Failure::Failed(format!("the bundle cannot be written to {shown} ({e}): give another place with --out"))
    };
    if to_stdout {
        write(stdout(), &name, &files).map_err(unwritten)?;
        eprintln!("the bundle {HOLDS}");
        return Ok(());
    }
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).map_err(unwritten)?;
    if let Err(e) = write(file, &name, &files).and_then(|file| file.sync_all()) {
        // A part of a bundle is of no use to anybody.
        let _ = std::fs::remove_file(&path);
        return Err(unwritten(e));
    }
    let size = |file: &BundleFile| json!({ "file": file.name, "bytes": file.content.len() });
    if sidecar.json {
        let files: Vec<_> = files.iter().map(size).collect();
        return say_json(&json!({ "bundle": path.display().to_string(), "files": files }));
    }
    let line = |file: &BundleFile| format!("{:>9}  {}", file.content.len(), file.name);
    say_all(&files.iter().map(line).collect::<Vec<_>>())?;
    say(&format!("made {}; it {HOLDS}", path.display()))
}

/// In a folder of the bundle's own name.
fn write<W: Write>(out: W, name: &str, files: &[BundleFile]) -> io::Result<W> {
    let mut archive = tar::Builder::new(GzEncoder::new(out, Compression::default()));
    let now = u64::try_from(OffsetDateTime::now_utc().unix_timestamp()).unwrap_or(0);
    for BundleFile { name: file, content } in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(now);
        archive.append_data(&mut header, format!("{name}/{file}"), &content[..])?;
    }
    let mut out = archive.into_inner()?.finish()?;
    out.flush()?;
    Ok(out)
}

/// A moment as a file's name holds it.
fn stamp(at: OffsetDateTime) -> String {
    let (date, time) = (at.date(), at.time());
    let day = format!("{:04}{:02}{:02}", date.year(), u8::from(date.month()), date.day());
    format!("{day}T{:02}{:02}{:02}Z", time.hour(), time.minute(), time.second())
}
