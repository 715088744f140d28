//! Job: hold this version to the protocol that docs/protocol.md writes down, by what an earlier build of it recorded.
//! Input: tests/recorded/protocol-1.txt, docs/protocol.md, proto/replicate.proto. Output: passes or fails. With RECORD=1 samples that are not
//! recorded yet are appended first.
//! Always true: what is recorded is never written over; each recording is compared as a whole with what it was made from.

mod newer;
mod samples;

use bytes::Bytes;
use etcd_ferry::wire::frame::{Decoded, decode_standalone, encode_standalone};
use etcd_ferry::wire::window::{Decoder, Encoder};
use etcd_ferry::wire::{HELLO_BYTES_MAX, LINK_METADATA, PROTOCOL_VERSION, RECEIPT_BYTES_MAX, SESSION_METADATA, digest};
use prost::Message as _;
use samples::{FRAME_LIMITS, Frame, Message, Stream};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

const CHECKSUM_BYTES: usize = 4;
const DIGEST_BYTES: usize = 16;
/// Version and flags.
const FIXED_BYTES: usize = 2;
/// Generation, epoch, term, seq, revisions, body.
const HEADER_NUMBERS: usize = 6;

static RECORDED: LazyLock<BTreeMap<String, Vec<u8>>> = LazyLock::new(|| {
    let path = file("tests/recorded/protocol-1.txt");
    let mut text = std::fs::read_to_string(&path).unwrap();
    if std::env::var_os("RECORD").is_some() {
        let known = parse(&text);
        for (name, bytes) in encode_samples().into_iter().filter(|(name, _)| !known.contains_key(name)) {
            writeln!(text, "\n{name}").unwrap();
            for line in bytes.chunks(32) {
                writeln!(text, "  {}", hex(line)).unwrap();
            }
        }
        std::fs::write(&path, &text).unwrap();
    }
    parse(&text)
});

fn file(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ")
}

fn unhex(text: &str) -> Vec<u8> {
    text.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).unwrap_or_else(|e| panic!("{byte}: {e}"))).collect()
}

/// A name on a line of its own, its bytes below it, indented; `#` begins a comment.
fn parse(text: &str) -> BTreeMap<String, Vec<u8>> {
    let mut recorded = BTreeMap::new();
    let mut name = "";
    for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if line.starts_with(' ') {
            recorded.entry(name.to_owned()).or_insert_with(Vec::new).extend(unhex(line));
        } else {
            assert!(!recorded.contains_key(line), "{line} is recorded twice");
            name = line;
        }
    }
    recorded
}

fn recorded(name: &str) -> &'static [u8] {
    RECORDED.get(name).unwrap_or_else(|| panic!("{name} is not recorded: RECORD=1 cargo test --test it protocol::"))
}

/// What this version makes of the samples.
fn encode_samples() -> Vec<(String, Vec<u8>)> {
    let mut encoded = Vec::new();
    for stream in samples::streams() {
        let mut encoder = stream.window.map(|limits| Encoder::new(limits, 1));
        for frame in &stream.frames {
            let Frame { epoch, term, seq_first, revisions, .. } = frame;
            let digests: Vec<_> = revisions.iter().map(digest::of_revision).collect();
            let bytes = match &mut encoder {
                None => encode_standalone(*epoch, *term, *seq_first, revisions, &digests),
                Some(encoder) => {
                    if frame.restart {
                        encoder.restart();
                    }
                    encoder.encode(*epoch, *term, *seq_first, revisions, &digests)
                }
            };
            encoded.push((frame.name.to_owned(), bytes.to_vec()));
        }
    }
    for (name, message) in samples::messages() {
        let mut bytes = match message {
            Message::Hello(message) => message.encode_to_vec(),
            Message::Reply(message) => message.encode_to_vec(),
            Message::Shipment(message) => message.encode_to_vec(),
            Message::Receipt(message) => message.encode_to_vec(),
        };
        bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
        encoded.push((name, bytes));
    }
    encoded
}

fn held(frame: &Frame) -> Decoded {
    Decoded {
        epoch: frame.epoch,
        term: frame.term,
        seq_first: frame.seq_first,
        revisions: frame.revisions.clone(),
        digests: frame.revisions.iter().map(digest::of_revision).collect(),
        plain_bytes: frame.revisions.iter().map(etcd_ferry::model::WholeRevision::bytes).sum(),
    }
}

#[test]
fn every_recorded_frame_is_decoded_to_all_that_it_held() {
    for Stream { window, frames } in samples::streams() {
        let mut decoder = window.map(Decoder::new);
        for frame in &frames {
            let bytes = recorded(frame.name);
            let decoded = match &mut decoder {
                None => decode_standalone(bytes, &FRAME_LIMITS).map_err(|e| e.to_string()),
                Some(decoder) => decoder.decode(bytes).map_err(|e| e.to_string()),
            };
            assert_eq!(decoded, Ok(held(frame)), "{}", frame.name);
        }
    }
}

#[test]
fn every_recorded_message_is_decoded_to_all_that_it_said() {
    for (name, message) in samples::messages() {
        let sealed = recorded(&name);
        let (bytes, checksum) = sealed.split_at(sealed.len() - CHECKSUM_BYTES);
        assert_eq!(checksum, crc32c::crc32c(bytes).to_le_bytes(), "{name}");
        let bytes = Bytes::copy_from_slice(bytes);
        let decoded = match &message {
            Message::Hello(_) => prost::Message::decode(bytes).map(|m| Message::Hello(Box::new(m))),
            Message::Reply(_) => prost::Message::decode(bytes).map(|m| Message::Reply(Box::new(m))),
            Message::Shipment(_) => prost::Message::decode(bytes).map(|m| Message::Shipment(Box::new(m))),
            Message::Receipt(_) => prost::Message::decode(bytes).map(|m| Message::Receipt(Box::new(m))),
        };
        assert_eq!(decoded, Ok(message), "{name}");
    }
}

/// The names in `message NAME { oneof what { ... } }`.
fn kinds(proto: &str, message: &str) -> BTreeSet<String> {
    let body = proto.split(&format!("message {message} {{")).nth(1).unwrap();
    let oneof = body.split("oneof what {").nth(1).unwrap().split('}').next().unwrap();
    let fields =
        oneof.lines().filter(|line| !line.trim_start().starts_with("//")).filter_map(|line| line.split_once(" = "));
    fields
        .map(|(field, _)| format!("{}.{}", message.to_lowercase(), field.split_whitespace().last().unwrap()))
        .collect()
}

#[test]
fn a_message_of_every_kind_and_a_frame_with_every_flag_and_every_tag_is_recorded() {
    let proto = std::fs::read_to_string(file("proto/replicate.proto")).unwrap();
    let mut wanted = kinds(&proto, "Shipment");
    wanted.extend(kinds(&proto, "Receipt"));
    assert_eq!(wanted.len(), 20, "the kinds that this test finds in the proto file");
    let lacking: Vec<&String> = wanted.iter().filter(|kind| !RECORDED.contains_key(*kind)).collect();
    assert!(lacking.is_empty(), "not recorded: {lacking:?}");

    let tables = tables();
    let here = |field: &str| -> BTreeSet<u8> {
        let rows = tables.iter().flat_map(|table| &table.rows).filter(|row| row.field == field);
        rows.map(|row| row.bytes[0]).collect()
    };
    assert_eq!(here("flags"), BTreeSet::from([0, 1, 2]), "the flags in the document's tables");
    assert_eq!(here("tag"), BTreeSet::from([0, 1, 2, 3, 4]), "the tags in the document's tables");
}

/// One table of bytes in the document.
struct Table {
    frame: String,
    of_body: bool,
    rows: Vec<Row>,
}

struct Row {
    at: usize,
    bytes: Vec<u8>,
    field: String,
}

/// Below `### Frame `NAME`` and `### Body of `NAME``: `| at | bytes | field | here |`.
fn tables() -> Vec<Table> {
    let document = document();
    let mut tables: Vec<Table> = Vec::new();
    let mut heading = "";
    for line in document.lines() {
        if let Some(text) = line.strip_prefix("### ") {
            heading = text;
        } else if line.starts_with("| at | bytes |") {
            let name = heading.split('`').nth(1).unwrap_or_else(|| panic!("{heading} names no frame")).to_owned();
            tables.push(Table { frame: name, of_body: heading.starts_with("Body of"), rows: Vec::new() });
        } else if let Some(cells) = line.strip_prefix("| ").filter(|row| row.starts_with(|c: char| c.is_ascii_digit()))
            && heading.contains('`')
        {
            let cells: Vec<&str> = cells.split('|').map(str::trim).collect();
            let row = Row {
                at: cells[0].parse().unwrap(),
                bytes: unhex(cells[1].trim_matches('`')),
                field: cells[2].to_owned(),
            };
            tables.last_mut().unwrap().rows.push(row);
        }
    }
    tables
}

fn document() -> String {
    std::fs::read_to_string(file("docs/protocol.md")).unwrap()
}

/// A number as the document says: seven bits a byte, the lowest first.
fn number(bytes: &[u8]) -> (u64, &[u8]) {
    let last = bytes.iter().position(|byte| *byte < 0x80).unwrap();
    let number = bytes[..=last].iter().rev().fold(0, |number, byte| number << 7 | u64::from(byte & 0x7f));
    (number, &bytes[last + 1..])
}

/// Header, checksum, block and the declared length of the body, read by the document alone.
fn cut(frame: &[u8]) -> (&[u8], u32, &[u8], usize) {
    let mut rest = &frame[FIXED_BYTES..];
    let mut body_bytes = 0;
    for _ in 0..HEADER_NUMBERS {
        (body_bytes, rest) = number(rest);
    }
    let (header, rest) = frame.split_at(frame.len() - rest.len() + DIGEST_BYTES);
    let (checksum, block) = rest.split_at(CHECKSUM_BYTES);
    (header, u32::from_le_bytes(checksum.try_into().unwrap()), block, usize::try_from(body_bytes).unwrap())
}

/// The bodies of all recorded frames, as the document says that they are found.
fn bodies() -> BTreeMap<&'static str, Vec<u8>> {
    let mut bodies = BTreeMap::new();
    for stream in samples::streams() {
        let mut dictionary: Vec<u8> = Vec::new();
        for frame in stream.frames {
            let bytes = recorded(frame.name);
            let (header, checksum, block, body_bytes) = cut(bytes);
            if bytes[1] & 2 != 0 {
                dictionary.clear();
            }
            let body = lz4_flex::block::decompress_with_dict(block, body_bytes, &dictionary).unwrap();
            assert_eq!(body.len(), body_bytes, "{}", frame.name);
            assert_eq!(crc32c::crc32c(&[header, block, &body].concat()), checksum, "{}", frame.name);
            dictionary.extend(&body);
            bodies.insert(frame.name, body);
        }
    }
    bodies
}

#[test]
fn the_document_s_tables_of_bytes_are_the_recorded_frames() {
    let bodies = bodies();
    let tables = tables();
    assert!(tables.len() >= 6, "the document's tables were not understood");
    for Table { frame, of_body, rows } in &tables {
        let whole = if *of_body { &bodies[frame.as_str()][..] } else { recorded(frame) };
        let mut at = 0;
        for row in rows {
            assert_eq!(row.at, at, "{frame}, of its body: {of_body}: the place of {}", row.field);
            at += row.bytes.len();
        }
        let told: Vec<u8> = rows.iter().flat_map(|row| row.bytes.clone()).collect();
        assert_eq!(hex(&told), hex(whole), "{frame}, of its body: {of_body}");
    }
}

#[test]
fn the_document_names_the_protocol_s_version_and_bounds_as_the_code_has_them() {
    let document = document();
    let kib = |bytes: usize| format!("{} KiB", bytes / 1024);
    let mib = |bytes: usize| format!("{} MiB", bytes / 1024 / 1024);
    for (field, value) in [
        ("protocol version", PROTOCOL_VERSION.to_string()),
        ("metadata of the link's name", format!("`{LINK_METADATA}`")),
        ("metadata of the session", format!("`{SESSION_METADATA}`")),
        ("a hello", kib(HELLO_BYTES_MAX)),
        ("a receipt, a hello's answer", mib(RECEIPT_BYTES_MAX)),
    ] {
        let row = format!("| {field} | {value} |");
        assert!(document.lines().any(|line| line.starts_with(&row)), "docs/protocol.md lacks: {row}");
    }
}
