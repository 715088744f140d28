//! Job: a value, said as what changed since an earlier value of the same key.
//! Input: base and target; or base and delta. Output: the delta; or the target.
//! Pure: no clock, no I/O.
//! Always true: the work is linear in base and target; decoding allocates nothing before the declared length is checked, and takes any bytes
//! without a panic.
//!
//! The form, in varints (`s`: signed), fixed as part of the protocol:
//!
//! ```text
//! delta    = s(target length - base length) step* literals
//! step     = copied, then, unless the target is complete: inserted * 2 + moved, then, if moved: s(shift)
//! literals = the inserted bytes of all steps, one after the other
//! ```
//!
//! A step copies `copied` bytes from where it stands in the base, then takes `inserted` bytes off the literals. It then stands `copied +
//! inserted + shift` bytes further in the base: a substitution of equal length needs no shift. Steps end where the target is complete.
//! Steps and literals stand apart because objects of a kind change at the same places: LZ4 then finds the steps as one match.

use crate::wire::varint;
use bytes::{BufMut, BytesMut};
use thiserror::Error;

/// Why a delta cannot be applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum DeltaError {
    #[error("a delta ends before its target is complete")]
    Truncated,
    #[error("a delta copies from outside of its base")]
    OutsideBase,
    #[error("a delta's steps make more than its target")]
    OutsideTarget,
    #[error("a delta makes a value of {target_len} bytes, and {target_len_max} are allowed")]
    TooLarge { target_len: usize, target_len_max: usize },
}

/// Equal bytes below this are not worth a step of their own.
const MATCH_BYTES_MIN: usize = 8;
/// How far behind an edit the walk looks for the place where base and target agree again, and how far apart it lets them be there.
const PROBE_BYTES: usize = 64;
const PROBE_SHIFT: usize = 8;
/// After so many edits that the probe did not see the end of, the block table is asked at once: values that differ everywhere.
const PROBES_FAILED_MAX: usize = 64;
/// The base's blocks in the table.
const BLOCK_BYTES: usize = 16;

/// `len` bytes that are the same in both.
#[derive(Clone, Copy)]
struct Match {
    base_at: usize,
    target_at: usize,
    len: usize,
}

/// Makes deltas; keeps its scratch memory between them.
#[derive(Default)]
pub struct DeltaEncoder {
    matches: Vec<Match>,
    table: Vec<u32>,
}

impl DeltaEncoder {
    /// Appends the delta to `out` and says true; or, where that is not smaller than the target, leaves `out` alone and says false.
    pub fn encode(&mut self, base: &[u8], target: &[u8], out: &mut Vec<u8>) -> bool {
        self.find_matches(base, target);
        let start = out.len();
        let (Ok(base_len), Ok(target_len)) = (i64::try_from(base.len()), i64::try_from(target.len())) else {
            return false;
        };
        varint::put_signed(out, target_len - base_len);
        let mut matches = self.matches.iter().peekable();
        while let Some(copied) = matches.next() {
            varint::put_len(out, copied.len);
            let insert_at = copied.target_at + copied.len;
            if insert_at == target.len() {
                break;
            }
            let next = matches.peek();
            let inserted = next.map_or(target.len(), |m| m.target_at) - insert_at;
            let stands_at = copied.base_at + copied.len + inserted;
            let shift = next.map_or(0, |m| m.base_at as i64 - stands_at as i64);
            varint::put_len(out, inserted * 2 + usize::from(shift != 0));
            if shift != 0 {
                varint::put_signed(out, shift);
            }
        }
        let mut insert_at = 0;
        for copied in &self.matches {
            out.extend_from_slice(&target[insert_at..copied.target_at]);
            insert_at = copied.target_at + copied.len;
        }
        out.extend_from_slice(&target[insert_at..]);
        if out.len() - start >= target.len() {
            out.truncate(start);
            return false;
        }
        true
    }

    /// Fills `matches` in the target's order; the first starts at 0 in both, if need be with no bytes.
    fn find_matches(&mut self, base: &[u8], target: &[u8]) {
        let prefix = common_prefix(base, target);
        let suffix = common_suffix(&base[prefix..], &target[prefix..]);
        self.matches.clear();
        self.matches.push(Match { base_at: 0, target_at: 0, len: prefix });
        if target.is_empty() {
            return;
        }
        let (base_end, target_end) = (base.len() - suffix, target.len() - suffix);
        let (mut base_at, mut target_at) = (prefix, prefix);
        let mut probes_failed = 0;
        let mut table_built = false;
        while target_at + MATCH_BYTES_MIN <= target_end {
            let mut found = None;
            if probes_failed < PROBES_FAILED_MAX {
                found = probe(base, target, base_at, target_at, target_end);
                probes_failed += usize::from(found.is_none());
            }
            if found.is_none() && target_at + BLOCK_BYTES <= target_end && base.len() >= BLOCK_BYTES {
                if !table_built {
                    self.fill_table(base);
                    table_built = true;
                }
                found = self.search_table(base, target, target_at, target_end);
            }
            let Some((base_from, target_from)) = found else { break };
            let len = common_prefix(&base[base_from..], &target[target_from..target_end]);
            self.push(Match { base_at: base_from, target_at: target_from, len });
            (base_at, target_at) = (base_from + len, target_from + len);
        }
        self.push(Match { base_at: base_end, target_at: target_end, len: suffix });
    }

    /// Joins what goes on where the last match ended.
    fn push(&mut self, next: Match) {
        match self.matches.last_mut() {
            Some(last) if last.base_at + last.len == next.base_at && last.target_at + last.len == next.target_at => {
                last.len += next.len;
            }
            _ if next.len > 0 => self.matches.push(next),
            _ => (),
        }
    }

    /// Every block of the base by its hash. Of equal blocks the first one stays: runs then match as a whole.
    fn fill_table(&mut self, base: &[u8]) {
        let blocks = base.len() / BLOCK_BYTES;
        self.table.clear();
        self.table.resize((blocks * 2).next_power_of_two(), 0);
        for block in 0..blocks {
            let slot = self.slot_of(base, block * BLOCK_BYTES);
            if let (Some(entry @ 0), Ok(number)) = (self.table.get_mut(slot), u32::try_from(block + 1)) {
                *entry = number;
            }
        }
    }

    fn slot_of(&self, bytes: &[u8], at: usize) -> usize {
        const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;
        let (low, high) = (word(bytes, at), word(bytes, at + 8));
        let mixed = (low.wrapping_mul(SPREAD).rotate_left(29) ^ high).wrapping_mul(SPREAD);
        // The upper half is the better mixed one; a table has at most 2^32 entries.
        (mixed >> 32) as usize & (self.table.len() - 1)
    }

    /// The next place at or after `target_at` that a whole block of the base equals, drawn back over what equals before it.
    fn search_table(&self, base: &[u8], target: &[u8], target_at: usize, target_end: usize) -> Option<(usize, usize)> {
        for at in target_at..=target_end - BLOCK_BYTES {
            let Some(block) = (self.table[self.slot_of(target, at)] as usize).checked_sub(1) else { continue };
            let from = block * BLOCK_BYTES;
            if base[from..from + BLOCK_BYTES] == target[at..at + BLOCK_BYTES] {
                let before = common_suffix(&base[..from], &target[target_at..at]);
                return Some((from - before, at - before));
            }
        }
        None
    }
}

/// The nearest place behind an edit where base and target agree again, the least shift first.
fn probe(base: &[u8], target: &[u8], base_at: usize, target_at: usize, target_end: usize) -> Option<(usize, usize)> {
    let ahead_max = (target_end - MATCH_BYTES_MIN - target_at).min(PROBE_BYTES);
    let base_last = base.len().checked_sub(MATCH_BYTES_MIN)?;
    for ahead in 0..=ahead_max {
        let wanted = word(target, target_at + ahead);
        let straight = base_at + ahead;
        for shift in 0..=PROBE_SHIFT {
            if straight + shift <= base_last && word(base, straight + shift) == wanted {
                return Some((straight + shift, target_at + ahead));
            }
            let back = straight.checked_sub(shift).filter(|back| *back <= base_last);
            if let Some(back) = back.filter(|back| word(base, *back) == wanted) {
                return Some((back, target_at + ahead));
            }
        }
    }
    None
}

/// Eight bytes at `at` as one number; the caller keeps within the bytes.
fn word(bytes: &[u8], at: usize) -> u64 {
    let mut eight = [0; 8];
    eight.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(eight)
}

fn common_prefix(a: &[u8], b: &[u8]) -> usize {
    let len = a.len().min(b.len());
    let mut at = 0;
    while at + 8 <= len {
        let differs = word(a, at) ^ word(b, at);
        if differs != 0 {
            return at + differs.trailing_zeros() as usize / 8;
        }
        at += 8;
    }
    while at < len && a[at] == b[at] {
        at += 1;
    }
    at
}

fn common_suffix(a: &[u8], b: &[u8]) -> usize {
    let len = a.len().min(b.len());
    let mut at = 0;
    while at + 8 <= len {
        let differs = word(a, a.len() - at - 8) ^ word(b, b.len() - at - 8);
        if differs != 0 {
            return at + differs.leading_zeros() as usize / 8;
        }
        at += 8;
    }
    while at < len && a[a.len() - at - 1] == b[b.len() - at - 1] {
        at += 1;
    }
    at
}

/// Takes one delta off the front of `input` and appends its target to `out`. `out` is untouched on an error.
pub fn decode(base: &[u8], input: &mut &[u8], target_len_max: usize, out: &mut BytesMut) -> Result<usize, DeltaError> {
    let difference = varint::take_signed(input).ok_or(DeltaError::Truncated)?;
    let base_len = i64::try_from(base.len()).map_err(|_| DeltaError::OutsideBase)?;
    let target_len = base_len.checked_add(difference).and_then(|len| usize::try_from(len).ok());
    let target_len = target_len.ok_or(DeltaError::OutsideTarget)?;
    if target_len > target_len_max {
        return Err(DeltaError::TooLarge { target_len, target_len_max });
    }
    // The first walk checks every step and finds the literals behind them, so that the second one cannot fail.
    let mut checked = Steps::new(input, target_len);
    let mut inserted = 0;
    while let Some(step) = checked.next(base.len())? {
        inserted += step.inserted;
    }
    let literals = checked.input.get(..inserted).ok_or(DeltaError::Truncated)?;
    let rest = &checked.input[inserted..];
    out.reserve(target_len);
    let mut steps = Steps::new(input, target_len);
    let mut literal_at = 0;
    while let Some(step) = steps.next(base.len())? {
        out.put_slice(&base[step.base_at..step.base_at + step.copied]);
        out.put_slice(&literals[literal_at..literal_at + step.inserted]);
        literal_at += step.inserted;
    }
    *input = rest;
    Ok(target_len)
}

struct Step {
    base_at: usize,
    copied: usize,
    inserted: usize,
}

/// Reads the steps of one delta, checking each.
struct Steps<'a> {
    input: &'a [u8],
    base_at: usize,
    target_left: usize,
}

impl<'a> Steps<'a> {
    fn new(input: &'a [u8], target_len: usize) -> Self {
        Self { input, base_at: 0, target_left: target_len }
    }

    fn next(&mut self, base_len: usize) -> Result<Option<Step>, DeltaError> {
        if self.target_left == 0 {
            return Ok(None);
        }
        let base_at = self.base_at;
        let copied = varint::take_len(&mut self.input).ok_or(DeltaError::Truncated)?;
        let base_left = base_len.checked_sub(base_at).ok_or(DeltaError::OutsideBase)?;
        // Nothing can be copied from behind the base, but a last insertion may well stand there.
        if copied > base_left {
            return Err(DeltaError::OutsideBase);
        }
        self.target_left = self.target_left.checked_sub(copied).ok_or(DeltaError::OutsideTarget)?;
        if self.target_left == 0 {
            return Ok(Some(Step { base_at, copied, inserted: 0 }));
        }
        let packed = varint::take_len(&mut self.input).ok_or(DeltaError::Truncated)?;
        let inserted = packed / 2;
        self.target_left = self.target_left.checked_sub(inserted).ok_or(DeltaError::OutsideTarget)?;
        let mut stands_at = (base_at + copied).checked_add(inserted).ok_or(DeltaError::OutsideBase)?;
        if packed % 2 == 1 {
            let shift = varint::take_signed(&mut self.input).ok_or(DeltaError::Truncated)?;
            let shift = isize::try_from(shift).map_err(|_| DeltaError::OutsideBase)?;
            stands_at = stands_at.checked_add_signed(shift).ok_or(DeltaError::OutsideBase)?;
        }
        self.base_at = stands_at;
        Ok(Some(Step { base_at, copied, inserted }))
    }
}
