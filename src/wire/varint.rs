//! Job: numbers in as few bytes as their size needs (LEB128: seven bits a byte, the lowest first, the top bit says that more follow).
//! Input: numbers, or bytes of a frame. Output: bytes of a frame, or numbers.
//! Pure: no clock, no I/O.
//! Always true: reading takes at most ten bytes, and what does not fit 64 bits is refused.

pub fn put(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number.to_le_bytes()[0] | 0x80);
        number >>= 7;
    }
    out.push(number.to_le_bytes()[0]);
}

/// A length or an index; those of this process fit 64 bits.
pub fn put_len(out: &mut Vec<u8>, len: usize) {
    put(out, len as u64);
}

/// A small number of either sign: 0, -1, 1, -2, ... become 0, 1, 2, 3, ...
pub fn put_signed(out: &mut Vec<u8>, number: i64) {
    put(out, ((number << 1) ^ (number >> 63)).cast_unsigned());
}

/// Takes a number off the front of `bytes`; `None` if they end too early or it does not fit.
pub fn take(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0u64;
    for (at, byte) in bytes.iter().enumerate().take(10) {
        let bits = u64::from(byte & 0x7f);
        if at == 9 && bits > 1 {
            return None;
        }
        number |= bits << (7 * at);
        if *byte < 0x80 {
            *bytes = &bytes[at + 1..];
            return Some(number);
        }
    }
    None
}

pub fn take_len(bytes: &mut &[u8]) -> Option<usize> {
    usize::try_from(take(bytes)?).ok()
}

pub fn take_signed(bytes: &mut &[u8]) -> Option<i64> {
    let folded = take(bytes)?;
    Some((folded >> 1).cast_signed() ^ -(folded & 1).cast_signed())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_does_not_fit_or_ends_too_early_is_refused() {
        for bytes in
            [&[][..], &[0x80], &[0xff; 9], &[0xff; 11], &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2]]
        {
            assert_eq!(take(&mut &bytes[..]), None, "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn every_number_is_read_back_and_what_follows_it_is_left(number: u64, shift in 0u32..64) {
            let (unsigned, signed) = (number >> shift, number.cast_signed() >> shift);
            let mut bytes = Vec::new();
            put(&mut bytes, unsigned);
            put_signed(&mut bytes, signed);
            bytes.push(7);
            let mut rest = &bytes[..];
            prop_assert_eq!(take(&mut rest), Some(unsigned));
            prop_assert_eq!(take_signed(&mut rest), Some(signed));
            prop_assert_eq!(rest, &[7][..]);
        }
    }
}
