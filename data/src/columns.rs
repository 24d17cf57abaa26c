//! Columns as bytes, for a file that another process of the same machine and version reads. Numbers are little-endian,
//! lists begin with their length.

use std::io::{self, Read, Write};

/// A list whose length is wrong must not take the memory before its bytes are there.
const MOST_AHEAD: usize = 1 << 20;

pub(crate) fn write_number(to: &mut impl Write, number: usize) -> io::Result<()> {
    to.write_all(&(number as u64).to_le_bytes())
}

pub(crate) fn read_number(from: &mut impl Read) -> io::Result<usize> {
    let mut bytes = [0; 8];
    from.read_exact(&mut bytes)?;
    usize::try_from(u64::from_le_bytes(bytes)).map_err(io::Error::other)
}

pub(crate) fn write_numbers(to: &mut impl Write, numbers: &[usize]) -> io::Result<()> {
    write_number(to, numbers.len())?;
    numbers.iter().try_for_each(|&number| write_number(to, number))
}

pub(crate) fn read_numbers(from: &mut impl Read) -> io::Result<Vec<usize>> {
    let count = read_number(from)?;
    let mut numbers = Vec::with_capacity(count.min(MOST_AHEAD));
    for _ in 0..count {
        numbers.push(read_number(from)?);
    }
    Ok(numbers)
}

pub(crate) fn write_u32s(to: &mut impl Write, numbers: &[u32]) -> io::Result<()> {
    write_number(to, numbers.len())?;
    numbers.iter().try_for_each(|number| to.write_all(&number.to_le_bytes()))
}

pub(crate) fn read_u32s(from: &mut impl Read) -> io::Result<Vec<u32>> {
    let count = read_number(from)?;
    let mut numbers = Vec::with_capacity(count.min(MOST_AHEAD));
    let mut bytes = [0; 4];
    for _ in 0..count {
        from.read_exact(&mut bytes)?;
        numbers.push(u32::from_le_bytes(bytes));
    }
    Ok(numbers)
}

pub(crate) fn write_bytes(to: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    write_number(to, bytes.len())?;
    to.write_all(bytes)
}

pub(crate) fn read_bytes(from: &mut impl Read) -> io::Result<Vec<u8>> {
    let count = read_number(from)?;
    let mut bytes = Vec::with_capacity(count.min(MOST_AHEAD));
    if from.take(count as u64).read_to_end(&mut bytes)? < count {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(bytes)
}

pub(crate) fn write_flags(to: &mut impl Write, flags: &[bool]) -> io::Result<()> {
    write_number(to, flags.len())?;
    flags.iter().try_for_each(|&flag| to.write_all(&[flag.into()]))
}

pub(crate) fn read_flags(from: &mut impl Read) -> io::Result<Vec<bool>> {
    Ok(read_bytes(from)?.into_iter().map(|byte| byte != 0).collect())
}

/// A column that may be absent.
pub(crate) fn write_option<W: Write, T: ?Sized>(
    to: &mut W,
    column: Option<&T>,
    write: impl FnOnce(&mut W, &T) -> io::Result<()>,
) -> io::Result<()> {
    write_number(to, usize::from(column.is_some()))?;
    column.map_or(Ok(()), |column| write(to, column))
}

pub(crate) fn read_option<R: Read, T>(
    from: &mut R,
    read: impl FnOnce(&mut R) -> io::Result<T>,
) -> io::Result<Option<T>> {
    match read_number(from)? {
        0 => Ok(None),
        _ => read(from).map(Some),
    }
}
