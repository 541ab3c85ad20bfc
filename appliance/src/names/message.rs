//! DNS messages (RFC 1035), as far as policy needs them: one question, and the addresses that answer it.
//!
//! Messages come from anybody. Nothing is allocated, a pointer may only point back, and the messages of one frame cost no
//! more than [`RECORDS`] records.

use crate::address::Address;
use sluice_contract::name::NAME_TEXT;

/// Records of a frame that are looked at, all messages and passes together: a hundred addresses at the end of a chain fit.
pub const RECORDS: usize = 1024;
/// Names that stand for each other, at most.
const CHAIN: usize = 16;
const HEADER: usize = 12;

/// Types of records and of questions.
pub const A: u16 = 1;
pub const CNAME: u16 = 5;
pub const AAAA: u16 = 28;
/// The Internet's class.
const IN: u16 = 1;

/// A name's text in lower case, without the dot at its end. Only names that rules can name have one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name {
    bytes: [u8; NAME_TEXT],
    length: usize,
}

impl Name {
    const EMPTY: Self = Self {
        bytes: [0; NAME_TEXT],
        length: 0,
    };

    pub fn text(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }

    fn push(&mut self, byte: u8) -> Option<()> {
        *self.bytes.get_mut(self.length)? = byte;
        self.length += 1;
        Some(())
    }
}

/// What is asked, by a question or by its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Question {
    /// By which the one who asks knows the answer.
    pub id: u16,
    pub is_answer: bool,
    pub name: Name,
    /// [`A`] or [`AAAA`].
    pub kind: u16,
    /// Where the records begin, and how many there are.
    records: usize,
    count: u16,
}

/// Reads the question; `None` if there is not exactly one, or it is not for addresses.
pub fn question(message: &[u8]) -> Option<Question> {
    let flags = word(message, 2)?;
    // QR and the opcode; an answer that says that something went wrong says nothing else.
    let (is_answer, opcode, failed) = (flags >> 15 == 1, flags >> 11 & 0xf, flags & 0xf != 0);
    if opcode != 0 || (is_answer && failed) || word(message, 4)? != 1 {
        return None;
    }
    let name = read_name(message, HEADER)?;
    let end = skip_name(message, HEADER)?;
    let (kind, class) = (word(message, end)?, word(message, end + 2)?);
    (matches!(kind, A | AAAA) && class == IN).then_some(Question {
        id: word(message, 0)?,
        is_answer,
        name,
        kind,
        records: end + 4,
        count: word(message, 6)?,
    })
}

/// The addresses that the message gives to the name of its question, each with the seconds for which that holds.
///
/// # Cost
/// As many records as `budget` still has, which they are taken from, each with a name of at most 253 bytes.
pub fn addresses(
    message: &[u8],
    question: &Question,
    budget: &mut usize,
    mut each: impl FnMut(Address, u32),
) {
    let mut name = question.name;
    let mut least = u32::MAX;
    for passed in 0.. {
        let mut all = Records::of(message, question, budget);
        let Some(record) = all.find(|it| it.kind == CNAME && it.is_of(message, &name)) else {
            break;
        };
        let Some(next) = read_name(message, record.data).filter(|_| passed < CHAIN) else {
            return;
        };
        name = next;
        least = least.min(record.seconds);
    }
    for record in Records::of(message, question, budget) {
        if record.kind != question.kind || !record.is_of(message, &name) {
            continue;
        }
        let data = message.get(record.data..record.data + record.length);
        let data = data.unwrap_or_default();
        let address = match record.kind {
            A => data.try_into().ok().map(Address::v4),
            _ => data.try_into().ok().map(Address),
        };
        if let Some(address) = address {
            each(address, least.min(record.seconds));
        }
    }
}

/// One record of the answer.
#[derive(Clone, Copy)]
struct Record {
    owner: usize,
    kind: u16,
    seconds: u32,
    data: usize,
    length: usize,
}

impl Record {
    fn is_of(&self, message: &[u8], name: &Name) -> bool {
        read_name(message, self.owner).is_some_and(|it| it == *name)
    }
}

/// The records of the answer, up to the first that is not all there.
struct Records<'a> {
    message: &'a [u8],
    at: usize,
    left: u16,
    budget: &'a mut usize,
}

impl<'a> Records<'a> {
    fn of(message: &'a [u8], question: &Question, budget: &'a mut usize) -> Self {
        Self {
            message,
            at: question.records,
            left: question.count,
            budget,
        }
    }
}

impl Iterator for Records<'_> {
    type Item = Record;

    fn next(&mut self) -> Option<Record> {
        loop {
            self.left = self.left.checked_sub(1)?;
            *self.budget = self.budget.checked_sub(1)?;
            let (message, owner) = (self.message, self.at);
            let fields = skip_name(message, owner)?;
            let (high, low) = (word(message, fields + 4)?, word(message, fields + 6)?);
            let seconds = u32::from(high) << 16 | u32::from(low);
            let length = usize::from(word(message, fields + 8)?);
            let data = fields + 10;
            message.get(data..data + length)?;
            self.at = data + length;
            let (kind, class) = (word(message, fields)?, word(message, fields + 2)?);
            if class == IN {
                return Some(Record {
                    owner,
                    kind,
                    // More than 31 bits mean none (RFC 2181 §8).
                    seconds: if seconds >> 31 == 1 { 0 } else { seconds },
                    data,
                    length,
                });
            }
        }
    }
}

fn word(message: &[u8], at: usize) -> Option<u16> {
    let bytes = message.get(at..at.checked_add(2)?)?;
    bytes.try_into().ok().map(u16::from_be_bytes)
}

/// Where what follows a name begins.
fn skip_name(message: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *message.get(at)? {
            0 => return Some(at + 1),
            length @ 1..=63 => at += 1 + usize::from(length),
            192.. => return message.get(at + 1).map(|_| at + 2),
            _ => return None,
        }
    }
}

/// The text of a name; `None` for the root and for names that no rule can name.
fn read_name(message: &[u8], mut at: usize) -> Option<Name> {
    let mut name = Name::EMPTY;
    // A pointer leads to what came before the part that it ends, so it never leads here again.
    let mut before = at;
    loop {
        match *message.get(at)? {
            0 => return (name.length > 0).then_some(name),
            length @ 1..=63 => {
                let label = message.get(at + 1..at + 1 + usize::from(length))?;
                if name.length > 0 {
                    name.push(b'.')?;
                }
                for byte in label {
                    let byte = byte.to_ascii_lowercase();
                    // A dot inside a label would make it look like two.
                    if !(byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_') {
                        return None;
                    }
                    name.push(byte)?;
                }
                at += 1 + label.len();
            }
            192.. => {
                let target = usize::from(word(message, at)? & 0x3fff);
                if target >= before {
                    return None;
                }
                (at, before) = (target, target);
            }
            _ => return None,
        }
    }
}
