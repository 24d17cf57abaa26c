//! Rows of tokens as a file, which the processes of a machine share.

use std::io::{self, Read, Write};

use athanor_models::tokenizer::TokenRows;

/// Writes the number of rows, and of each row its length and its ids.
///
/// # Errors
/// Those of the writer.
pub fn write(rows: &TokenRows, to: &mut impl Write) -> io::Result<()> {
    to.write_all(&(rows.len() as u64).to_le_bytes())?;
    for ids in rows.iter() {
        let length = u32::try_from(ids.len()).map_err(io::Error::other)?;
        to.write_all(&length.to_le_bytes())?;
        ids.iter().try_for_each(|id| to.write_all(&id.to_le_bytes()))?;
    }
    Ok(())
}

/// Reads what [`write`] wrote.
///
/// # Errors
/// Those of the reader, and a file that is cut off.
pub fn read(from: &mut impl Read) -> io::Result<TokenRows> {
    let mut count = [0; 8];
    from.read_exact(&mut count)?;
    let mut rows = TokenRows::default();
    let (mut bytes, mut ids) = (Vec::new(), Vec::new());
    for _ in 0..u64::from_le_bytes(count) {
        let mut length = [0; 4];
        from.read_exact(&mut length)?;
        bytes.resize(u32::from_le_bytes(length) as usize * 4, 0);
        from.read_exact(&mut bytes)?;
        ids.clear();
        ids.extend(bytes.chunks_exact(4).map(|id| u32::from_le_bytes([id[0], id[1], id[2], id[3]])));
        rows.push(&ids);
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_read_as_they_were_written() {
        let rows: TokenRows = [vec![101, 7, u32::MAX], vec![], vec![102]].into_iter().collect();
        let mut file = Vec::new();
        write(&rows, &mut file).unwrap();
        let mut left = &file[..];
        let same = read(&mut left).unwrap();
        assert!(left.is_empty());
        assert!(same.iter().eq(rows.iter()));
        assert!(read(&mut &file[..file.len() - 1]).is_err(), "a file that is cut off");
        assert!(read(&mut &[0; 8][..]).unwrap().is_empty());
    }
}
