//! Many strings in one buffer: eight bytes each beside their text, and no allocation of their own.

use std::{
    hash::BuildHasher,
    io::{self, Read, Write},
};

use hashbrown::{DefaultHashBuilder, HashTable};

use crate::columns::{read_bytes, read_numbers, write_bytes, write_numbers};

/// A list of strings, behind each other in one buffer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Strings {
    buffer: String,
    /// Where each string ends; it begins where the one before ends.
    ends: Vec<usize>,
}

impl Strings {
    pub fn push(&mut self, text: &str) {
        self.buffer.push_str(text);
        self.ends.push(self.buffer.len());
    }

    pub fn get(&self, index: usize) -> &str {
        let begin = if index == 0 { 0 } else { self.ends[index - 1] };
        &self.buffer[begin..self.ends[index]]
    }

    pub fn len(&self) -> usize {
        self.ends.len()
    }

    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        write_bytes(to, self.buffer.as_bytes())?;
        write_numbers(to, &self.ends)
    }

    pub fn read(from: &mut impl Read) -> io::Result<Self> {
        let buffer = String::from_utf8(read_bytes(from)?).map_err(io::Error::other)?;
        Ok(Self { buffer, ends: read_numbers(from)? })
    }

    /// Keeps the strings for whose index `keep` is true, in place: nothing is allocated.
    pub fn retain(&mut self, mut keep: impl FnMut(usize) -> bool) {
        let mut bytes = std::mem::take(&mut self.buffer).into_bytes();
        let (mut begin, mut length, mut kept) = (0, 0, 0);
        for index in 0..self.ends.len() {
            let end = self.ends[index];
            if keep(index) {
                bytes.copy_within(begin..end, length);
                length += end - begin;
                self.ends[kept] = length;
                kept += 1;
            }
            begin = end;
        }
        bytes.truncate(length);
        self.ends.truncate(kept);
        // Whole strings are whole characters; this checks it in passing, without unsafe code.
        self.buffer =
            String::from_utf8(bytes).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned());
    }
}

/// Strings that occur once, by number: labels and groups.
#[derive(Clone, Default)]
pub(crate) struct Dictionary {
    names: Strings,
    numbers: HashTable<u32>,
    hasher: DefaultHashBuilder,
}

impl Dictionary {
    /// The number of a string, a new one if it is new.
    pub fn number(&mut self, name: &str) -> u32 {
        let Self { names, numbers, hasher } = self;
        let entry = numbers.entry(
            hasher.hash_one(name),
            |&number| names.get(number as usize) == name,
            |&number| hasher.hash_one(names.get(number as usize)),
        );
        match entry {
            hashbrown::hash_table::Entry::Occupied(entry) => *entry.get(),
            hashbrown::hash_table::Entry::Vacant(entry) => {
                // More than four billion different names do not fit into memory.
                let number = names.len() as u32;
                entry.insert(number);
                names.push(name);
                number
            }
        }
    }

    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        self.names.write(to)
    }

    pub fn read(from: &mut impl Read) -> io::Result<Self> {
        let names = Strings::read(from)?;
        let mut dictionary = Self::default();
        for index in 0..names.len() {
            dictionary.number(names.get(index));
        }
        Ok(dictionary)
    }

    pub fn name(&self, number: u32) -> &str {
        self.names.get(number as usize)
    }

    pub fn len(&self) -> usize {
        self.names.len()
    }
}

impl std::fmt::Debug for Dictionary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries((0..self.len()).map(|number| self.names.get(number))).finish()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_dictionary_numbers_each_name_once() {
        let mut dictionary = Dictionary::default();
        assert_eq!(["a", "b", "", "a", "b"].map(|name| dictionary.number(name)), [0, 1, 2, 0, 1]);
        assert_eq!((dictionary.name(1), dictionary.len()), ("b", 3));
        for number in 0..1000 {
            assert_eq!(dictionary.number(&format!("name {number}")), number + 3);
        }
    }

    proptest! {
        #[test]
        fn strings_are_kept_like_a_vector(texts in proptest::collection::vec(".{0,8}", 0..20), mask in any::<u32>()) {
            let mut strings = Strings::default();
            texts.iter().for_each(|text| strings.push(text));
            prop_assert_eq!((0..strings.len()).map(|i| strings.get(i)).collect::<Vec<_>>(), texts.clone());
            strings.retain(|index| mask >> index & 1 == 1);
            let expected: Vec<_> = texts.iter().enumerate().filter(|(i, _)| mask >> i & 1 == 1).map(|(_, t)| t).collect();
            prop_assert_eq!((0..strings.len()).map(|i| strings.get(i)).collect::<Vec<_>>(), expected);
        }
    }
}
