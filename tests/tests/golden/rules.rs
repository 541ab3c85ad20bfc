//! Which bytes of two frames for the same packet may differ, and why. Everything else is a failure.

use crate::packets::{CE, Sample};
use anyhow::{Result, ensure};
use std::collections::BTreeSet;
use std::ops::Range;

/// Whose frame ours is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Other {
    Kernel,
    OpenVswitch,
}

const ETHERNET: usize = 14;
/// Offsets within the outer headers.
const CARD: Range<usize> = 6..12;
const CLASS4: usize = ETHERNET + 1;
const ID4: Range<usize> = ETHERNET + 4..ETHERNET + 6;
const FLAGS4: usize = ETHERNET + 6;
const CHECKSUM4: Range<usize> = ETHERNET + 10..ETHERNET + 12;
const CLASS6: usize = ETHERNET + 1;
/// But for its first four bits, which lie beside the class.
const LABEL6: Range<usize> = ETHERNET + 2..ETHERNET + 4;
const ECN: u8 = 3;
const DONT_FRAGMENT: u8 = 0x40;

/// Where the frames differ, each place by its name; every one is allowed, and what is derived from such places is right in
/// itself.
///
/// # Errors
/// A byte that may not differ, or an own byte of ours that is not as it has to be.
pub(crate) fn differences(
    ours: &[u8],
    theirs: &[u8],
    other: Other,
    sample: &Sample,
) -> Result<Vec<&'static str>> {
    ensure!(
        ours.len() == theirs.len(),
        "{} and {} bytes",
        ours.len(),
        theirs.len()
    );
    let six = ours.get(12..14) == Some(&[0x86, 0xdd]);
    let udp = ETHERNET + if six { 40 } else { 20 };
    let mut named = BTreeSet::new();
    for (at, (our, their)) in ours.iter().zip(theirs).enumerate() {
        if our == their {
            continue;
        }
        let bits = our ^ their;
        let (name, allowed) = match at {
            _ if CARD.contains(&at) => ("the card's own address", true),
            // RFC 6040 §4.1 against RFC 3168 §9.1.1: a mark that is there already stays visible outside.
            CLASS4 if !six => (
                "ECN of a marked packet",
                sample.class & ECN == CE && our & ECN == CE && bits & !ECN == 0,
            ),
            CLASS6 if six && bits & 0xf0 == 0 => ("the outer flow label", true),
            CLASS6 if six => (
                "ECN of a marked packet",
                sample.class & ECN == CE && our >> 4 & ECN == CE && bits & 0xf0 & !(ECN << 4) == 0,
            ),
            // Ours have a mark there by which a quoted packet is known again. That of a packet that is never cut is
            // free (RFC 6864 §4.1).
            _ if !six && ID4.contains(&at) => ("the outer id", true),
            _ if six && LABEL6.contains(&at) => ("the outer flow label", true),
            // Ours are never cut, theirs may be unless the device is told otherwise.
            FLAGS4 if !six => (
                "DF",
                other == Other::Kernel && bits == DONT_FRAGMENT && our & DONT_FRAGMENT != 0,
            ),
            _ if !six && CHECKSUM4.contains(&at) => ("the outer header checksum", true),
            _ if (udp..udp + 2).contains(&at) => ("the outer source port", true),
            // Over IPv4 ours has none (RFC 7348 §5); the kernel's device makes one unless told otherwise.
            _ if (udp + 6..udp + 8).contains(&at) => (
                "the outer UDP checksum",
                six || (other == Other::Kernel && *our == 0),
            ),
            _ => ("", false),
        };
        ensure!(
            allowed,
            "byte {at} {name} is {our:#04x} of ours, {their:#04x} of theirs"
        );
        named.insert(name);
    }
    for frame in [ours, theirs] {
        sound(frame, six, udp)?;
    }
    let port = ours.get(udp..udp + 2).unwrap_or_default();
    ensure!(
        port >= [0xc0, 0].as_slice(),
        "the outer source port is {port:?}"
    );
    Ok(named.into_iter().collect())
}

/// The checksums that may differ are right in themselves.
fn sound(frame: &[u8], six: bool, udp: usize) -> Result<()> {
    let network = frame.get(ETHERNET..).unwrap_or_default();
    let datagram = frame.get(udp..).unwrap_or_default();
    let addresses = if six { 8..40 } else { 12..20 };
    let header = network.get(..20).unwrap_or_default();
    ensure!(
        six || fold(sum(header)) == 0xffff,
        "the outer header checksum"
    );
    let pseudo = sum(network.get(addresses).unwrap_or_default()) + 17 + datagram.len() as u64;
    let has_none = datagram.get(6..8) == Some(&[0, 0]);
    ensure!(
        (has_none && !six) || fold(pseudo + sum(datagram)) == 0xffff,
        "the outer UDP checksum"
    );
    Ok(())
}

fn sum(bytes: &[u8]) -> u64 {
    let word = |pair: &[u8]| u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0));
    bytes.chunks(2).map(word).sum()
}

const fn fold(mut sum: u64) -> u64 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum
}
