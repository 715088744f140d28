//! Job: what whoever helps an operator wants to see of a sidecar, as text files.
//! Input: the directory, the process's own, its certificates. Output: files by name, in pieces of the service's answer; at the caller, whole again.
//! Edge: looks at the sizes of what lies below `data_dir`.
//! Always true: no key, no value, nothing of a secret file is in it; no piece, no file and no bundle is larger than its bound.

use super::client::{ClientError, Connection, TIMEOUT, connect, dialled, refused};
use super::proto::admin_client::AdminClient;
use super::proto::{BundlePart, BundleRequest, GetCertificatesReply};
use super::{Directory, Own, certificates, http};
use crate::config::effective_toml;
use crate::metrics;
use bytes::Bytes;
use serde::Serialize;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_util::sync::CancellationToken;
use tonic::Status;

/// Far below what a message of gRPC may have.
const PIECE_BYTES: usize = 64 << 10;
/// Metrics grow with links, the log has a bound of its own: this is some hundred times what is usual.
const BUNDLE_BYTES_MAX: usize = 64 << 20;
/// A spool of 8 GiB has 128 files; of more than these, the largest are not looked for.
const DATA_FILES_MAX: usize = 4_096;
/// Bundles that are told at once: each is in memory as a whole.
pub(super) const BUNDLES_MAX: usize = 4;
/// Each piece comes within it, and is taken within it.
const SILENCE_MAX: Duration = TIMEOUT;

/// One file of a bundle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BundleFile {
    pub name: String,
    pub content: Vec<u8>,
}

/// Everything, as it is now. To be called where it may block: it reads folders.
pub(super) fn files(directory: &Directory, own: &Own, certificates: &GetCertificatesReply) -> Vec<BundleFile> {
    let links = directory.snapshots();
    links.iter().for_each(metrics::record_link);
    let file = |name: &str, content: String| BundleFile { name: name.to_owned(), content: content.into_bytes() };
    vec![
        file("about.json", about(directory)),
        file("configuration.toml", effective_toml(&own.config())),
        file("status.json", pretty(&http::full_health(directory))),
        file("certificates.json", certificates::certificates_json(certificates)),
        file("metrics.txt", own.exporter.render_links(&links)),
        file("log.txt", own.logs.recent()),
        file("data.json", pretty(&data(&own.config().data_dir))),
    ]
}

fn pretty(of: &impl Serialize) -> String {
    serde_json::to_string_pretty(of).unwrap_or_else(|e| format!("it cannot be written as JSON: {e}"))
}

fn about(directory: &Directory) -> String {
    let Directory { region, node, version, started, listening, .. } = directory;
    pretty(&json!({
        "region": region,
        "node": node,
        "version": version,
        "uptime_seconds": started.elapsed().as_secs(),
        "listening": listening,
        "system": std::env::consts::OS,
        "processor": std::env::consts::ARCH,
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
    }))
}

/// What lies below a sidecar's folder.
#[derive(Debug, Default, Serialize)]
struct Data {
    bytes: u64,
    files: Vec<DataFile>,
    /// Of more files, only so many were looked at.
    more: bool,
    /// Folders that could not be read, and why.
    unread: Vec<String>,
}

#[derive(Debug, Serialize)]
struct DataFile {
    /// Below `data_dir`.
    file: String,
    bytes: u64,
}

fn data(root: &Path) -> Data {
    let mut data = Data::default();
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        let entries = match std::fs::read_dir(root.join(&folder)) {
            Ok(entries) => entries,
            Err(e) => {
                data.unread.push(format!("{}: {e}", folder.display()));
                continue;
            }
        };
        for entry in entries.flatten() {
            let path = folder.join(entry.file_name());
            // A file that is trimmed meanwhile is gone.
            let Ok(found) = entry.metadata() else { continue };
            if found.is_dir() {
                folders.push(path);
            } else if data.files.len() >= DATA_FILES_MAX {
                data.more = true;
                return data;
            } else {
                data.bytes += found.len();
                data.files.push(DataFile { file: path.display().to_string(), bytes: found.len() });
            }
        }
    }
    data.files.sort_by(|a, b| a.file.cmp(&b.file));
    data
}

/// Hands the files out piece by piece, until the caller is gone or the sidecar stops.
pub(super) async fn tell(
    files: Vec<BundleFile>,
    _place: OwnedSemaphorePermit,
    stop: CancellationToken,
    out: mpsc::Sender<Result<BundlePart, Status>>,
) {
    let telling = async {
        for BundleFile { name, content } in files {
            let content = Bytes::from(content);
            // Of an empty file, its name.
            let pieces = content.len().div_ceil(PIECE_BYTES).max(1);
            for piece in 0..pieces {
                let from = piece * PIECE_BYTES;
                let content = content.slice(from..content.len().min(from + PIECE_BYTES));
                if out.send_timeout(Ok(BundlePart { file: name.clone(), content }), SILENCE_MAX).await.is_err() {
                    return;
                }
            }
        }
    };
    tokio::select! {
        biased;
        () = stop.cancelled() => {}
        () = telling => {}
    }
}

/// A running sidecar's bundle.
pub async fn bundle(connection: &Connection) -> Result<Vec<BundleFile>, ClientError> {
    let at = dialled(connection.admin);
    let late = |_| ClientError::Timeout { at };
    let calling = async {
        let mut client = AdminClient::new(connect(connection).await?);
        client.bundle(BundleRequest {}).await.map_err(|status| refused(connection, &status))
    };
    let mut pieces = tokio::time::timeout(TIMEOUT, calling).await.map_err(late)??.into_inner();
    let mut files: Vec<BundleFile> = Vec::new();
    let mut bytes = 0;
    while let Some(part) = tokio::time::timeout(SILENCE_MAX, pieces.message())
        .await
        .map_err(late)?
        .map_err(|status| refused(connection, &status))?
    {
        bytes += part.content.len();
        put_together(&mut files, part, bytes).map_err(|reason| ClientError::Refused { at, reason })?;
    }
    Ok(files)
}

/// Pieces of one file follow each other. `bytes`: of all files so far.
fn put_together(files: &mut Vec<BundleFile>, part: BundlePart, bytes: usize) -> Result<(), String> {
    let BundlePart { file: name, content } = part;
    let plain = |c: char| c.is_ascii_lowercase() || matches!(c, '.' | '-');
    if name.is_empty() || name.starts_with('.') || !name.chars().all(plain) {
        return Err(format!("its bundle has a file of the name {name:?}, which this command does not write"));
    }
    if bytes > BUNDLE_BYTES_MAX {
        return Err(format!("its bundle has more than {BUNDLE_BYTES_MAX} bytes"));
    }
    match files.last_mut() {
        Some(last) if last.name == name => last.content.extend_from_slice(&content),
        Some(_) | None => files.push(BundleFile { name, content: content.to_vec() }),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use tokio::sync::Semaphore;

    fn part(file: &str, content: &'static [u8]) -> BundlePart {
        BundlePart { file: file.to_owned(), content: Bytes::from_static(content) }
    }

    #[tokio::test]
    async fn files_come_in_pieces_and_are_put_together_again() {
        let file = |name: &str, bytes: usize| BundleFile { name: name.to_owned(), content: vec![7; bytes] };
        let sent = vec![file("a.txt", PIECE_BYTES * 2 + 1), file("empty.txt", 0), file("b.txt", PIECE_BYTES)];
        let (out, mut pieces) = mpsc::channel(1);
        let places = Arc::new(Semaphore::new(1));
        let place = places.clone().try_acquire_owned().unwrap();
        let telling = tell(sent.clone(), place, CancellationToken::new(), out);
        assert_eq!(places.available_permits(), 0, "until it is told");
        let mut files = Vec::new();
        let listening = async {
            while let Some(piece) = pieces.recv().await {
                let piece = piece.unwrap();
                assert!(piece.content.len() <= PIECE_BYTES);
                put_together(&mut files, piece, 0).unwrap();
            }
        };
        tokio::join!(telling, listening);
        assert!(files == sent);
        assert_eq!(places.available_permits(), 1);
    }

    #[test]
    fn a_name_that_leaves_the_folder_and_a_bundle_without_end_are_refused() {
        for name in ["", "..", ".hidden", "a/b", "/etc/passwd", "A", "a\n"] {
            assert!(put_together(&mut Vec::new(), part(name, b""), 0).is_err(), "{name:?}");
        }
        let mut files = Vec::new();
        assert!(put_together(&mut files, part("a", b"1"), BUNDLE_BYTES_MAX).is_ok());
        assert!(put_together(&mut files, part("a", b"2"), BUNDLE_BYTES_MAX + 1).is_err());
        assert_eq!(files[0].content, b"1");
    }

    #[test]
    fn the_sizes_of_all_files_below_the_folder_are_told_and_not_what_is_in_them() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("origin/config/spool")).unwrap();
        std::fs::write(root.path().join("origin/config/spool/1.seg"), "value").unwrap();
        std::fs::write(root.path().join("a"), "").unwrap();
        let told = data(root.path());
        assert_eq!(
            serde_json::to_string(&told).unwrap(),
            "{\"bytes\":5,\"files\":[{\"file\":\"a\",\"bytes\":0},{\"file\":\"origin/config/spool/1.seg\",\"bytes\":5}],\"more\":false,\
             \"unread\":[]}"
        );
        assert_eq!(data(&root.path().join("nowhere")).unread.len(), 1);
    }
}
