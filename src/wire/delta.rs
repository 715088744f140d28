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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The delta's length, once it is proven to make the target again; `None` if the whole value is no larger.
    fn delta_len(base: &[u8], target: &[u8]) -> Option<usize> {
        let mut delta = vec![0xee];
        let smaller = DeltaEncoder::default().encode(base, target, &mut delta);
        assert_eq!(delta[0], 0xee);
        if !smaller {
            assert_eq!(delta.len(), 1, "nothing is left behind");
            return None;
        }
        let len = delta.len() - 1;
        assert!(len < target.len());
        delta.push(0xdd);
        let (mut input, mut out) = (&delta[1..], BytesMut::new());
        assert_eq!(decode(base, &mut input, target.len(), &mut out), Ok(target.len()));
        assert!(out == target);
        assert_eq!(input, &[0xdd], "what follows the delta is left");
        Some(len)
    }

    /// Bytes without a pattern; the same for the same seed.
    fn noise(mut seed: u64, len: usize) -> Vec<u8> {
        let mut next = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 56).to_le_bytes()[0]
        };
        (0..len).map(|_| next()).collect()
    }

    #[test]
    fn numbers_that_grow_by_a_digit_in_several_places_cost_little_more_than_their_digits() {
        let object = |version: u32, count: u32, now: &str| {
            format!(
                r#"{{"kind":"Lease","resourceVersion":"{version}","holder":"node-17.zone-b","spec":{{"transitions":{count},"renewTime":"{now}","leaseDurationSeconds":40,"acquired":"2026-01-02T03:04:05Z"}}}}"#
            )
        };
        let (base, target) = (object(9_998, 99, "2026-01-09T13:59:58Z"), object(10_003, 100, "2026-01-09T14:00:08Z"));
        let len = delta_len(base.as_bytes(), target.as_bytes()).unwrap();
        assert!(len <= 30, "{len} bytes");
    }

    #[test]
    fn a_value_that_did_not_change_costs_next_to_nothing() {
        assert_eq!(delta_len(&noise(1, 1_000), &noise(1, 1_000)), Some(3));
    }

    #[test]
    fn parts_that_moved_far_are_found() {
        let parts: Vec<Vec<u8>> = (0..8).map(|seed| noise(seed, 500)).collect();
        let base = parts.concat();
        let target = [&parts[5][..], &parts[1], b"something new", &parts[7], &parts[2], &parts[2]].concat();
        let len = delta_len(&base, &target).unwrap();
        assert!(len <= 60, "{len} bytes");
    }

    #[test]
    fn values_without_anything_in_common_have_no_delta() {
        assert_eq!(delta_len(&noise(1, 1_000), &noise(2, 1_000)), None);
        assert_eq!(delta_len(b"", b"new"), None);
        assert_eq!(delta_len(b"old", b""), None);
        assert_eq!(delta_len(b"", b""), None);
    }

    /// If the work grew as the square of the length, this would take an hour.
    #[test]
    fn the_largest_values_are_compared_in_linear_time() {
        const LEN: usize = 3 << 19;
        let base = noise(1, LEN);
        let mut edited = base.clone();
        for at in (0..LEN).step_by(1_500) {
            edited[at] ^= 0x55;
        }
        edited.splice(700_000..700_010, noise(3, 77));
        assert!(delta_len(&base, &edited).unwrap() < LEN / 100);
        assert_eq!(delta_len(&base, &noise(2, LEN)), None);
        // Edits so dense that a match follows each, then none; runs; short periods that match nearly everywhere.
        let dense =
            |step: usize| base.iter().enumerate().map(|(at, b)| b ^ u8::from(at % step == 0)).collect::<Vec<u8>>();
        for step in [7, 9, 12, 17, 70] {
            delta_len(&base, &dense(step));
        }
        let periodic = |period: usize| (0..LEN).map(|at| u8::from(at % period == 0)).collect::<Vec<u8>>();
        for (a, b) in [(LEN, 2), (15, 16), (16, 17), (64, 65), (300, 301), (1_000, 999)] {
            delta_len(&periodic(a), &periodic(b));
        }
    }

    #[test]
    fn a_declared_length_above_the_limit_is_refused_before_anything_is_allocated() {
        for difference in [1, i64::MAX - 4, -5, i64::MIN] {
            let mut delta = Vec::new();
            varint::put_signed(&mut delta, difference);
            let mut out = BytesMut::new();
            assert!(decode(b"base", &mut &delta[..], 4, &mut out).is_err(), "{difference}");
            assert_eq!(out.capacity(), 0);
        }
        // All of it is there: the limit alone refuses it.
        let whole = |out: &mut BytesMut, max| decode(b"base", &mut &[2, 4, 2, b'!'][..], max, out);
        let mut out = BytesMut::new();
        assert_eq!(whole(&mut out, 4), Err(DeltaError::TooLarge { target_len: 5, target_len_max: 4 }));
        assert_eq!(out.capacity(), 0);
        assert_eq!(whole(&mut out, 5), Ok(5));
    }

    #[test]
    fn steps_outside_of_base_or_target_are_refused() {
        let refused = |delta: &[u8]| decode(b"base", &mut &delta[..], 100, &mut BytesMut::new()).unwrap_err();
        assert_eq!(refused(&[0, 5]), DeltaError::OutsideBase);
        assert_eq!(refused(&[1, 4, 0]), DeltaError::OutsideTarget);
        assert_eq!(refused(&[0, 3, 4, b'x', b'y']), DeltaError::OutsideTarget);
        assert_eq!(refused(&[0, 3]), DeltaError::Truncated);
        assert_eq!(refused(&[0, 3, 2]), DeltaError::Truncated);
        assert_eq!(refused(&[0, 0, 1, 1, 4]), DeltaError::OutsideBase);
        assert_eq!(refused(&[0, 0, 1, 10, 4]), DeltaError::OutsideBase);
    }

    proptest! {
        #[test]
        fn any_edits_are_made_again(
            base in prop::collection::vec(0u8..4, 0..400),
            edits in prop::collection::vec((any::<prop::sample::Index>(), 0usize..40, prop::collection::vec(0u8..6, 0..40)), 0..8),
        ) {
            let mut target = base.clone();
            for (at, removed, inserted) in edits {
                let at = at.index(target.len() + 1);
                target.splice(at..(at + removed).min(target.len()), inserted);
            }
            delta_len(&base, &target);
        }

        #[test]
        fn any_bytes_are_decoded_or_refused(base: Vec<u8>, delta in prop::collection::vec(0u8..24, 0..60)) {
            let mut out = BytesMut::new();
            let decoded = decode(&base, &mut &delta[..], 1_000, &mut out);
            prop_assert_eq!(out.len(), decoded.unwrap_or(0));
        }
    }
}
