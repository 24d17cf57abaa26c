//! Rows as a file: their columns one after the other.

use std::io::{self, Read, Write};

use super::{Origin, Rows, Run};
use crate::{
    columns::{
        read_bytes, read_flags, read_number, read_option, read_u32s, write_bytes, write_flags, write_number,
        write_option, write_u32s,
    },
    strings::{Dictionary, Strings},
};

impl Rows {
    pub(crate) fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let Self { texts, pairs, labels, label_names, groups, conversations, group_names, numbers, runs } = self;
        texts.write(to)?;
        write_option(to, pairs.as_ref(), |to, pairs| pairs.write(to))?;
        write_u32s(to, labels)?;
        label_names.write(to)?;
        write_option(to, groups.as_deref(), write_u32s)?;
        write_option(to, conversations.as_deref(), write_flags)?;
        group_names.write(to)?;
        write_u32s(to, numbers)?;
        write_number(to, runs.len())?;
        runs.iter().try_for_each(|run| run.write(to))
    }

    pub(crate) fn read(from: &mut impl Read) -> io::Result<Self> {
        let texts = Strings::read(from)?;
        let pairs = read_option(from, Strings::read)?;
        let labels = read_u32s(from)?;
        let label_names = Dictionary::read(from)?;
        let groups = read_option(from, read_u32s)?;
        let conversations = read_option(from, read_flags)?;
        let group_names = Dictionary::read(from)?;
        let numbers = read_u32s(from)?;
        let count = read_number(from)?;
        let runs = (0..count).map(|_| Run::read(from)).collect::<io::Result<_>>()?;
        Ok(Self { texts, pairs, labels, label_names, groups, conversations, group_names, numbers, runs })
    }
}

impl Run {
    fn write(&self, to: &mut impl Write) -> io::Result<()> {
        write_number(to, self.first)?;
        write_number(to, self.source)?;
        let (name, events) = match &self.origin {
            Origin::File { uri } => (uri, None),
            Origin::Topic { topic, events } => (topic, Some(events)),
        };
        write_bytes(to, name.as_bytes())?;
        write_option(to, events, |to, events| events.write(to))
    }

    fn read(from: &mut impl Read) -> io::Result<Self> {
        let (first, source) = (read_number(from)?, read_number(from)?);
        let name = String::from_utf8(read_bytes(from)?).map_err(io::Error::other)?;
        let origin = match read_option(from, Strings::read)? {
            None => Origin::File { uri: name },
            Some(events) => Origin::Topic { topic: name, events },
        };
        Ok(Self { first, source, origin })
    }
}
