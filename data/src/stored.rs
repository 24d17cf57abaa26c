//! A dataset and its split as a file: what one process of a machine prepared and its other processes load.

use std::io::{self, Read, Write};

use crate::{
    Dataset, Parts, Rows,
    columns::{
        read_bytes, read_flags, read_numbers, read_option, read_u32s, write_bytes, write_flags, write_numbers,
        write_option, write_u32s,
    },
};

impl Dataset {
    /// Writes the rows and what the split requires; not what the report alone has (rows that were skipped, topics, cleaning).
    ///
    /// # Errors
    /// Those of the writer.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let head = (&self.sources, &self.held_out, &self.digest);
        write_bytes(to, &serde_json::to_vec(&head)?)?;
        self.rows.write(to)?;
        write_option(to, self.clusters.as_deref(), write_u32s)?;
        write_flags(to, &self.annotated)
    }

    /// Reads what [`Self::write`] of the same version wrote on the same machine.
    ///
    /// # Errors
    /// Those of the reader, and a file that is cut off.
    pub fn read(from: &mut impl Read) -> io::Result<Self> {
        let (sources, held_out, digest) = serde_json::from_slice(&read_bytes(from)?)?;
        let rows = Rows::read(from)?;
        let clusters = read_option(from, read_u32s)?;
        let annotated = read_flags(from)?;
        Ok(Self { sources, held_out, rows, digest, clusters, annotated, ..Self::default() })
    }
}

impl Parts {
    /// Writes the row indices; not the overlap, which the report alone has.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        [&self.train, &self.validation, &self.test].into_iter().try_for_each(|part| write_numbers(to, part))
    }

    /// Reads what [`Self::write`] wrote.
    ///
    /// # Errors
    /// Those of the reader, and a file that is cut off.
    pub fn read(from: &mut impl Read) -> io::Result<Self> {
        let (train, validation, test) = (read_numbers(from)?, read_numbers(from)?, read_numbers(from)?);
        Ok(Self { train, validation, test, overlap: None })
    }
}

#[cfg(test)]
mod tests {
    use athanor_contract::train::{HeldOutPart, SplitSpec};

    use super::*;
    use crate::{
        rows::{Fields, Origin},
        strings::Strings,
    };

    /// Everything that a message, a training or a split asks of a row.
    fn described(data: &Dataset) -> Vec<String> {
        let rows = &data.rows;
        let describe = |row: usize| {
            let (text, pair, label, group) = (rows.text(row), rows.pair(row), rows.label(row), rows.group(row));
            let (place, part) = (rows.place(row), data.part_of_source(row));
            format!("{text} {pair:?} {label:?} {group:?} {place} {part:?} {}", rows.is_conversation(row))
        };
        (0..rows.len()).map(describe).collect()
    }

    #[test]
    fn a_dataset_is_read_as_it_was_written() {
        let mut rows = Rows::default();
        rows.begin(0, Origin::File { uri: "empty.csv".into() });
        rows.begin(0, Origin::File { uri: "ä.csv".into() });
        rows.push(2, Fields { text: "eins ä", label: Some("x"), group: Some("g"), ..Fields::default() });
        rows.push(3, Fields { text: "zwei", pair: Some("two"), is_conversation: true, ..Fields::default() });
        let mut events = Strings::default();
        events.push("r/0");
        rows.begin(1, Origin::Topic { topic: "t".into(), events });
        rows.push(0, Fields { text: "drei", label: Some("y"), ..Fields::default() });
        for number in 0..60 {
            rows.push(0, Fields { text: &format!("row {number}"), label: Some("y"), ..Fields::default() });
        }
        let count = rows.len();
        let data = Dataset {
            sources: vec!["a".into(), "b".into()],
            held_out: vec![Some(HeldOutPart::Test), None],
            rows,
            digest: "d".into(),
            clusters: Some((0..count as u32).collect()),
            annotated: (0..count).map(|row| row % 2 == 1).collect(),
            ..Dataset::default()
        };
        let mut file = Vec::new();
        data.write(&mut file).unwrap();
        let mut left = &file[..];
        let mut read = Dataset::read(&mut left).unwrap();
        assert!(left.is_empty());
        assert_eq!(described(&read), described(&data));
        assert_eq!((&read.sources, &read.digest), (&data.sources, &data.digest));
        assert_eq!((&read.clusters, &read.annotated), (&data.clusters, &data.annotated));
        read.rows.set_label(1, "y");
        assert_eq!(read.rows.label_names(), ["x", "y"], "names keep their numbers");
        assert!(Dataset::read(&mut &file[..file.len() - 1]).is_err(), "a file that is cut off");

        let parts = data.split(&SplitSpec::default()).unwrap();
        let mut file = Vec::new();
        parts.write(&mut file).unwrap();
        let same = Parts { overlap: None, ..parts };
        assert_eq!(Parts::read(&mut &file[..]).unwrap(), same);
        assert!(Parts::read(&mut &file[..file.len() - 1]).is_err());
    }
}
