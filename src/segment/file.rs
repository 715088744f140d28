//! Job: one segment file as it stands on disk: its header, its records, reading it from its start.
//! Input: a file. Output: its header and its good records, and where the first bad byte is.
//! Always true: a record is given out only if its checksum holds; no length is believed before it is checked against limit and file.
//!
//! ```text
//! file    = header (48 bytes), records, zeros up to at least `padded_bytes`
//! header  = magic 8, number u64, after u64, tag u64, padded_bytes u64, starts_anew u32, crc32c u32 (of what stands before it)
//! record  = length u32, crc32c u32 (of length, index and payload), index u64, payload      (all little-endian)
//! ```
//!
//! The zeros are a hole that costs no disk. They make every truncation visible: a file cut at a record's end would otherwise
//! look like one that was never written further.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

pub const HEADER_BYTES: u64 = 48;
pub const RECORD_HEADER_BYTES: u64 = 16;
const MAGIC: [u8; 8] = *b"FERRYSG1";
const READ_BYTES: usize = 256 * 1024;

/// What a file says about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// One more than that of the file before it.
    pub number: u64,
    /// The index of the last record before this file.
    pub after: u64,
    /// The caller's; the same in all files of a log.
    pub tag: u64,
    /// The file is at least so long, unless it was truncated.
    pub padded_bytes: u64,
    /// Everything in the files before this one is void.
    pub starts_anew: bool,
}

impl Header {
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        for number in [self.number, self.after, self.tag, self.padded_bytes] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend(u32::from(self.starts_anew).to_le_bytes());
        bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
        bytes
    }

    /// `None`: this is not a header that we wrote.
    fn decode(bytes: &[u8]) -> Option<Self> {
        let checked = bytes.get(..44)?;
        if checked[..8] != MAGIC || crc32c::crc32c(checked) != u32_at(bytes, 44)? {
            return None;
        }
        Some(Self {
            number: u64_at(bytes, 8)?,
            after: u64_at(bytes, 16)?,
            tag: u64_at(bytes, 24)?,
            padded_bytes: u64_at(bytes, 32)?,
            starts_anew: u32_at(bytes, 40)? == 1,
        })
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// The 16 bytes before a payload. `length` is the payload's.
pub fn record_header(length: u32, index: u64, payload: &[u8]) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&length.to_le_bytes());
    bytes[4..8].copy_from_slice(&record_crc(length, index, payload).to_le_bytes());
    bytes[8..].copy_from_slice(&index.to_le_bytes());
    bytes
}

fn record_crc(length: u32, index: u64, payload: &[u8]) -> u32 {
    let crc = crc32c::crc32c_append(crc32c::crc32c(&length.to_le_bytes()), &index.to_le_bytes());
    crc32c::crc32c_append(crc, payload)
}

/// A file that is being read from front to back.
#[derive(Debug)]
pub struct OpenFile {
    pub header: Header,
    /// The index of the last record read, at first `header.after`.
    pub last: u64,
    /// Where the next record starts.
    pub offset: u64,
    reader: BufReader<File>,
}

impl OpenFile {
    /// `None`: the header is damaged or missing.
    pub fn open(path: &Path) -> io::Result<Option<Self>> {
        let mut reader = BufReader::with_capacity(READ_BYTES, File::open(path)?);
        let mut bytes = Vec::new();
        reader.by_ref().take(HEADER_BYTES).read_to_end(&mut bytes)?;
        Ok(Header::decode(&bytes).map(|header| Self { header, last: header.after, offset: HEADER_BYTES, reader }))
    }

    /// Reads the next good record into `payload` and returns its index; `None`: there is none (the end, or a bad byte).
    /// After a `None` call `reread` before trying again: the buffer may hold what the writer has replaced since.
    pub fn next(&mut self, payload: &mut Vec<u8>, record_bytes_max: usize) -> io::Result<Option<u64>> {
        let mut head = [0; 16];
        match self.reader.read_exact(&mut head) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            read => read?,
        }
        let (Some(length), Some(crc), Some(index)) = (u32_at(&head, 0), u32_at(&head, 4), u64_at(&head, 8)) else {
            return Ok(None);
        };
        let file_bytes = self.reader.get_ref().metadata()?.len();
        let end = self.offset + RECORD_HEADER_BYTES + u64::from(length);
        let too_long = usize::try_from(length).map_or(true, |length| length > record_bytes_max);
        if index <= self.last || too_long || end > file_bytes {
            return Ok(None);
        }
        payload.clear();
        self.reader.by_ref().take(u64::from(length)).read_to_end(payload)?;
        if record_crc(length, index, payload) != crc || end - self.offset - RECORD_HEADER_BYTES != payload.len() as u64
        {
            return Ok(None);
        }
        self.last = index;
        self.offset = end;
        Ok(Some(index))
    }

    /// Forgets what was read ahead.
    pub fn reread(&mut self) -> io::Result<()> {
        self.reader.seek(SeekFrom::Start(self.offset)).map(|_| ())
    }

    /// What stands after the good records: `None` if only zeros do, up to the padded length; else how many bytes of rubbish
    /// (0: the file is too short).
    fn rubbish(&mut self) -> io::Result<Option<u64>> {
        self.reread()?;
        let (mut at, mut rubbish_end) = (self.offset, self.offset);
        let mut chunk = vec![0; READ_BYTES];
        loop {
            let got = self.reader.get_mut().read(&mut chunk)?;
            if got == 0 {
                break;
            }
            if let Some(last) = chunk[..got].iter().rposition(|byte| *byte != 0) {
                rubbish_end = at + last as u64 + 1;
            }
            at += got as u64;
        }
        let rubbish = rubbish_end - self.offset;
        Ok((rubbish > 0 || at < self.header.padded_bytes).then_some(rubbish))
    }
}

/// What a scan of a whole file found.
#[derive(Debug)]
pub struct Scanned {
    /// The first and the last record's index; `last` is `header.after` if there is none.
    pub first: Option<u64>,
    pub last: u64,
    /// Where the good records end.
    pub end: u64,
    /// How many bytes of rubbish stand after the good records, 0 if the file is too short; `None`: all is well.
    pub rubbish: Option<u64>,
}

/// Reads all of a file and shows each good record to `visit`.
pub fn scan(mut file: OpenFile, record_bytes_max: usize, visit: &mut dyn FnMut(u64, &[u8])) -> io::Result<Scanned> {
    let mut first = None;
    let mut payload = Vec::new();
    while let Some(index) = file.next(&mut payload, record_bytes_max)? {
        first.get_or_insert(index);
        visit(index, &payload);
    }
    let rubbish = file.rubbish()?;
    Ok(Scanned { first, last: file.last, end: file.offset, rubbish })
}
