//! The command line: which devices there are, how the machine idles, what it is asked to do.

/// Most transports a machine may announce (QEMU microvm has 24).
pub const MAX_TRANSPORTS: usize = 32;
/// Octets of randomness that a VMM gives.
pub const SEED: usize = 32;
/// A transport's register window.
const TRANSPORT_SIZE: u64 = 512;
/// Where a VMM may put words for the guest to read: mapped read-only, and below the image.
const LOW_MEMORY: core::ops::Range<u64> = 0x1000..0x10_0000;

/// Ways to end badly, for tests of a VMM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Breaking {
    /// A fault in ring 3.
    Fault,
    /// A fault in ring 0, on behalf of ring 3.
    Ring0,
    Panic,
    /// No sign of life.
    Hang,
}

/// What the command line says, each word checked.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Options {
    transports: [u64; MAX_TRANSPORTS],
    transport_count: usize,
    pub park: Option<u64>,
    pub tsc_khz: Option<u64>,
    /// Where the VMM says whether frames move while the guest runs: a word in low memory.
    pub advice: Option<u64>,
    pub seed: Option<[u8; SEED]>,
    pub selftest: bool,
    pub breaking: Option<Breaking>,
    /// Tokens that mean nothing here, and those whose value does not hold.
    pub unknown: u32,
}

impl Options {
    /// Reads the tokens; `is_device` says which addresses ring 3 may use as device registers.
    pub fn parse(line: &str, is_device: impl Fn(u64, u64) -> bool) -> Self {
        let mut options = Self::default();
        for token in line.split_ascii_whitespace() {
            if options.token(token, &is_device).is_none() {
                options.unknown = options.unknown.saturating_add(1);
            }
        }
        options
    }

    /// The transports' addresses in the order given.
    pub fn transports(&self) -> &[u64] {
        self.transports
            .get(..self.transport_count)
            .unwrap_or_default()
    }

    fn token(&mut self, token: &str, is_device: &impl Fn(u64, u64) -> bool) -> Option<()> {
        if token == "sluice.selftest" {
            self.selftest = true;
            return Some(());
        }
        let (key, value) = token.split_once('=')?;
        match key {
            "sluice.park" => {
                let page = number(value).filter(|a| a % 4096 == 0 && is_device(*a, 4096))?;
                self.park = Some(page);
            }
            "sluice.tsc_khz" => {
                // 10 MHz to 100 GHz: outside, durations overflow or lose their meaning.
                let khz = number(value).filter(|k| (10_000..=100_000_000).contains(k))?;
                self.tsc_khz = Some(khz);
            }
            "sluice.advice" => {
                let word = number(value).filter(|at| at % 4 == 0 && LOW_MEMORY.contains(at))?;
                self.advice = Some(word);
            }
            "sluice.seed" => self.seed = Some(octets(value)?),
            "sluice.break" => {
                self.breaking = Some(match value {
                    "fault" => Breaking::Fault,
                    "ring0" => Breaking::Ring0,
                    "panic" => Breaking::Panic,
                    "hang" => Breaking::Hang,
                    _ => return None,
                });
            }
            "virtio_mmio.device" => {
                let address = transport(value)?;
                let usable = address % 4 == 0 && is_device(address, TRANSPORT_SIZE);
                let slot = self
                    .transports
                    .get_mut(self.transport_count)
                    .filter(|_| usable)?;
                *slot = address;
                self.transport_count += 1;
            }
            _ => return None,
        }
        Some(())
    }
}

/// `512@0xADDRESS:IRQ`, or `4K@…` as some VMMs write it; the interrupt line does not matter to a
/// machine that polls.
fn transport(value: &str) -> Option<u64> {
    let (size, rest) = value.split_once('@')?;
    let size = match size.strip_suffix('K') {
        Some(kilobytes) => number(kilobytes)?.checked_mul(1024)?,
        None => number(size)?,
    };
    if size < TRANSPORT_SIZE {
        return None;
    }
    number(rest.split(':').next()?)
}

fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(hexadecimal) => u64::from_str_radix(hexadecimal, 16).ok(),
        None => text.parse().ok(),
    }
}

/// Two hexadecimal digits each, and no fewer or more.
fn octets(text: &str) -> Option<[u8; SEED]> {
    let (digits, rest) = text.as_bytes().as_chunks::<2>();
    if digits.len() != SEED || !rest.is_empty() {
        return None;
    }
    let mut octets = [0; SEED];
    for (octet, [high, low]) in octets.iter_mut().zip(digits) {
        let digit = |byte: u8| char::from(byte).to_digit(16);
        *octet = u8::try_from(digit(*high)? << 4 | digit(*low)?).ok()?;
    }
    Some(octets)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(line: &str) -> Options {
        Options::parse(line, |a, n| a >= 0xc000_0000 && a + n <= 0x1_0000_0000)
    }

    #[test]
    fn qemu_and_sluice_vmm_command_lines_are_understood() {
        let options = parse(
            "sluice.selftest virtio_mmio.device=512@0xfeb00e00:12 virtio_mmio.device=512@0xfeb00c00:11",
        );
        assert_eq!(options.transports(), [0xfeb0_0e00, 0xfeb0_0c00]);
        assert!(options.selftest && options.park.is_none() && options.unknown == 0);
        let options = parse("virtio_mmio.device=4K@0xd0000000:5");
        assert_eq!(options.transports(), [0xd000_0000]);
        let options = parse("sluice.park=0xd0001000 sluice.tsc_khz=2400000");
        assert_eq!(
            (options.park, options.tsc_khz),
            (Some(0xd000_1000), Some(2_400_000))
        );
        assert_eq!(options.unknown, 0);
        let options = parse("sluice.advice=0x9000");
        assert_eq!((options.advice, options.unknown), (Some(0x9000), 0));
        let options = parse(&std::format!("sluice.seed={}", "0fA9".repeat(SEED / 2)));
        assert_eq!(options.seed.unwrap()[..4], [0x0f, 0xa9, 0x0f, 0xa9]);
        assert_eq!(options.unknown, 0);
    }

    #[test]
    fn addresses_outside_the_device_window_are_not_taken() {
        for line in [
            "virtio_mmio.device=512@0x200000:5",
            "virtio_mmio.device=4@0xfeb00000:5",
            "virtio_mmio.device=99999999999999999K@0xfeb00000:5",
            "virtio_mmio.device=512@0xfeb00001:5",
            "sluice.park=0x1000",
            "sluice.advice=0",
            "sluice.advice=0x9002",
            "sluice.advice=0x100000",
            "sluice.advice=0xd0000000",
            "sluice.park=0xfe000010",
            "sluice.break=glass",
            "sluice.seed=00",
            "sluice.seed=zz",
            "sluice.tsc_khz=0",
            "sluice.tsc_khz=99999999999999999999",
            "console=ttyS0",
            "quiet",
        ] {
            let options = parse(line);
            assert_eq!(
                options,
                Options {
                    unknown: 1,
                    ..Options::default()
                },
                "{line}"
            );
        }
    }

    #[test]
    fn more_transports_than_slots_are_counted_not_followed() {
        let line = std::string::String::from("virtio_mmio.device=512@0xfeb00000:5 ")
            .repeat(MAX_TRANSPORTS + 3);
        let options = parse(&line);
        assert_eq!(
            (options.transports().len(), options.unknown),
            (MAX_TRANSPORTS, 3)
        );
    }

    proptest! {
        #[test]
        fn noise_never_panics(line in ".{0,300}") {
            let _ = parse(&line);
        }
    }
}
