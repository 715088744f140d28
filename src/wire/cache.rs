//! Job: the last value of each key, as both ends of a stream remember it, under a slot number that stands for the key on the wire.
//! Input: the puts and deletes of the stream, in its order. Output: slots, keys and values.
//! Pure: no clock, no I/O.
//! Always true: the same calls leave the same slots at both ends; the bytes counted never exceed the maximum; nothing here holds on to a
//! buffer of the caller.

use bytes::Bytes;
use std::collections::HashMap;

/// What an entry costs beside its key and value. Part of the protocol: both ends must evict at the same moment.
pub const ENTRY_OVERHEAD_BYTES: usize = 192;
/// A value larger than this share of the cache is not kept: it would drive out too many others.
pub const VALUE_SHARE_MAX: usize = 8;

const NONE: u32 = u32::MAX;

struct Entry {
    key: Bytes,
    value: Vec<u8>,
    newer: u32,
    older: u32,
}

/// Bounded by bytes; the entry that was put least recently goes first.
pub struct Cache {
    /// By slot; `None` is free.
    entries: Vec<Option<Entry>>,
    free: Vec<u32>,
    slots: HashMap<Bytes, u32>,
    newest: u32,
    oldest: u32,
    bytes: usize,
    bytes_max: usize,
}

impl Cache {
    pub fn new(bytes_max: usize) -> Self {
        Self {
            entries: Vec::new(),
            free: Vec::new(),
            slots: HashMap::new(),
            newest: NONE,
            oldest: NONE,
            bytes: 0,
            bytes_max,
        }
    }

    pub fn slot_of(&self, key: &[u8]) -> Option<u32> {
        self.slots.get(key).copied()
    }

    pub fn get(&self, slot: u32) -> Option<(&Bytes, &[u8])> {
        let entry = self.entries.get(slot as usize)?.as_ref()?;
        Some((&entry.key, &entry.value))
    }

    /// The key's value is now this one. A value that is too large to keep drops the key instead.
    pub fn put(&mut self, key: &[u8], value: &[u8]) {
        let present = self.slot_of(key);
        if value.len() > self.bytes_max / VALUE_SHARE_MAX || cost(key, value) > self.bytes_max {
            if let Some(slot) = present {
                self.remove(slot);
            }
            return;
        }
        match present {
            Some(slot) => self.renew(slot, value),
            None => self.insert(key, value),
        }
        while self.bytes > self.bytes_max {
            self.remove(self.oldest);
        }
    }

    pub fn remove(&mut self, slot: u32) {
        self.unlink(slot);
        let Some(entry) = self.entries.get_mut(slot as usize).and_then(Option::take) else { return };
        self.bytes -= cost(&entry.key, &entry.value);
        self.slots.remove(&entry.key);
        self.free.push(slot);
    }

    /// Slot, key and value of all entries, the one put last first.
    #[cfg(test)]
    pub fn entries_newest_first(&self) -> Vec<(u32, &[u8], &[u8])> {
        let next = |slot: u32| self.entries.get(slot as usize).and_then(Option::as_ref).map(|entry| (slot, entry));
        std::iter::successors(next(self.newest), |(_, entry)| next(entry.older))
            .map(|(slot, entry)| (slot, &entry.key[..], &entry.value[..]))
            .collect()
    }

    fn renew(&mut self, slot: u32, value: &[u8]) {
        self.unlink(slot);
        if let Some(entry) = self.entry_mut(slot) {
            let before = entry.value.len();
            keep(&mut entry.value, value);
            self.bytes = self.bytes - before + value.len();
        }
        self.link_newest(slot);
    }

    fn insert(&mut self, key: &[u8], value: &[u8]) {
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => match u32::try_from(self.entries.len()) {
                Ok(slot) if slot < NONE => {
                    self.entries.push(None);
                    slot
                }
                _ => return,
            },
        };
        let key = Bytes::copy_from_slice(key);
        self.bytes += cost(&key, value);
        self.slots.insert(key.clone(), slot);
        self.entries[slot as usize] = Some(Entry { key, value: value.to_vec(), newer: NONE, older: NONE });
        self.link_newest(slot);
    }

    fn link_newest(&mut self, slot: u32) {
        let before = self.newest;
        if let Some(entry) = self.entry_mut(slot) {
            (entry.newer, entry.older) = (NONE, before);
        }
        match self.entry_mut(before) {
            Some(entry) => entry.newer = slot,
            None => self.oldest = slot,
        }
        self.newest = slot;
    }

    fn unlink(&mut self, slot: u32) {
        let Some(entry) = self.entry_mut(slot) else { return };
        let (newer, older) = (entry.newer, entry.older);
        match self.entry_mut(newer) {
            Some(entry) => entry.older = older,
            None => self.newest = older,
        }
        match self.entry_mut(older) {
            Some(entry) => entry.newer = newer,
            None => self.oldest = newer,
        }
    }

    fn entry_mut(&mut self, slot: u32) -> Option<&mut Entry> {
        self.entries.get_mut(slot as usize)?.as_mut()
    }
}

fn cost(key: &[u8], value: &[u8]) -> usize {
    key.len() + value.len() + ENTRY_OVERHEAD_BYTES
}

/// Reuses the memory of the last value, unless that would keep much more than is counted.
fn keep(kept: &mut Vec<u8>, value: &[u8]) {
    let spare_max = value.len() / 4 + 64;
    if kept.capacity() < value.len() || kept.capacity() > value.len() + spare_max {
        *kept = value.to_vec();
    } else {
        kept.clear();
        kept.extend_from_slice(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn value_of<'a>(cache: &'a Cache, key: &[u8]) -> Option<&'a [u8]> {
        cache.slot_of(key).and_then(|slot| cache.get(slot)).map(|(_, value)| value)
    }

    #[test]
    fn the_key_that_was_put_least_recently_goes_first() {
        let mut cache = Cache::new(3 * (ENTRY_OVERHEAD_BYTES + 2));
        for key in [b"a", b"b", b"c", b"a", b"d"] {
            cache.put(key, b"1");
        }
        assert_eq!(value_of(&cache, b"b"), None);
        for key in [b"a", b"c", b"d"] {
            assert_eq!(value_of(&cache, key), Some(&b"1"[..]));
        }
    }

    #[test]
    fn a_value_too_large_to_keep_drops_the_one_before_it() {
        let mut cache = Cache::new(8_000);
        cache.put(b"a", &[1; 1_000]);
        assert!(value_of(&cache, b"a").is_some());
        cache.put(b"a", &[1; 1_001]);
        assert_eq!(value_of(&cache, b"a"), None);
        assert_eq!(cache.bytes, 0);
    }

    proptest! {
        #[test]
        fn it_holds_what_was_put_last_within_its_bytes(
            steps in prop::collection::vec((0u8..12, prop::option::of(prop::collection::vec(0u8..2, 0..120))), 0..200),
            bytes_max in 0usize..2_000,
        ) {
            let mut cache = Cache::new(bytes_max);
            let mut all = HashMap::new();
            for (key, value) in steps {
                match &value {
                    Some(value) => cache.put(&[key], value),
                    None => if let Some(slot) = cache.slot_of(&[key]) { cache.remove(slot) },
                }
                all.insert(key, value);
                let held: Vec<&Entry> = cache.entries.iter().flatten().collect();
                prop_assert_eq!(cache.entries_newest_first().len(), held.len());
                prop_assert_eq!(cache.bytes, held.iter().map(|e| cost(&e.key, &e.value)).sum::<usize>());
                prop_assert!(cache.bytes <= bytes_max);
                prop_assert_eq!(cache.slots.len(), held.len());
                for entry in held {
                    prop_assert_eq!(Some(&entry.value), all[&entry.key[0]].as_ref());
                    prop_assert!(entry.value.capacity() <= entry.value.len() + entry.value.len() / 4 + 64);
                }
            }
        }
    }
}
