//! Job: what a refusal means for the link, at both sides alike.
//! Input: the kind of a refusal. Output: whether the link stops.
//! Pure: no clock, no I/O, no async.
//! Always true: a link stops for what another hello would not mend, and for nothing else.

use super::replicate::refusal::Kind;

/// Whether only an operator can go on after this refusal; after any other, the next hello learns where the replica is.
pub fn stops(kind: Kind) -> bool {
    match kind {
        Kind::Guard | Kind::Conflict | Kind::Outside | Kind::TooLarge => true,
        Kind::Fenced | Kind::PositionMoved | Kind::Gap | Kind::Closing | Kind::Unspecified => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_stops_for_what_another_hello_would_not_mend_and_for_nothing_else() {
        // As `Kind` is documented in the protocol.
        for (kind, stopped) in [
            (Kind::Unspecified, false),
            (Kind::Fenced, false),
            (Kind::PositionMoved, false),
            (Kind::Gap, false),
            (Kind::Guard, true),
            (Kind::Conflict, true),
            (Kind::Outside, true),
            (Kind::TooLarge, true),
            (Kind::Closing, false),
        ] {
            assert_eq!(stops(kind), stopped, "{kind:?}");
        }
    }
}
