//! Names of rules, by their text: a question is looked up with each of its ends.

use super::table::{Full, Table};
use sluice_contract::name::{NAME_TEXT, NameId, NameRow, Numbers};

/// Words of a name's text.
const TEXT: usize = NAME_TEXT.div_ceil(8);
/// Views, the number, the length with the wildcard's bit, and the text.
pub(super) const NAME_SLOT: usize = 3 + TEXT;
/// Besides the length: all names below this one are meant.
const WILDCARD: u64 = 1 << 32;

/// All names.
#[derive(Debug)]
pub(super) struct Names<'m> {
    pub(super) table: Table<'m, NAME_SLOT, 1>,
}

impl Names<'_> {
    pub(super) fn put(&mut self, row: &NameRow) -> Result<(), Full> {
        let words = pack(row.text.as_bytes(), row.wildcard);
        self.table.put(0, &[row.id.0], &words)
    }

    /// The names that are `name`, or that stand for all below them of which it is one.
    ///
    /// # Cost
    /// One lookup for each label.
    pub(super) fn ends_of<'a>(&'a self, name: &'a [u8]) -> impl Iterator<Item = NameId> + 'a {
        let mut numbers = Numbers::default();
        let above = (0..name.len()).rev().filter_map(move |at| {
            let byte = *name.get(at)?;
            let number = numbers.number(true);
            numbers.push(byte);
            let end = name.get(at + 1..)?;
            (byte == b'.' && at > 0).then_some((number, end))
        });
        let above = above.filter_map(|(number, end)| self.find(number, end, true));
        let mut whole = Numbers::default();
        for byte in name.iter().rev() {
            whole.push(*byte);
        }
        let itself = self.find(whole.number(false), name, false);
        itself.into_iter().chain(above)
    }

    fn find(&self, number: u64, text: &[u8], wildcard: bool) -> Option<NameId> {
        let words = self.table.find(0, &[number])?;
        (words == pack(text, wildcard)).then_some(NameId(number))
    }
}

fn pack(text: &[u8], wildcard: bool) -> [u64; 1 + TEXT] {
    let mut words = [0; 1 + TEXT];
    let (head, rest) = words.split_at_mut(1);
    if let [head] = head {
        *head = text.len() as u64 | if wildcard { WILDCARD } else { 0 };
    }
    for (word, bytes) in rest.iter_mut().zip(text.chunks(8)) {
        let mut padded = [0; 8];
        for (to, from) in padded.iter_mut().zip(bytes) {
            *to = *from;
        }
        *word = u64::from_le_bytes(padded);
    }
    words
}
