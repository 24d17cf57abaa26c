//! Zeroed memory on the boundary of a huge page: weights are read once a step from end to end.

use std::alloc::{self, Layout};

use crate::{Error, ffi};

/// Smallest size that is worth huge pages, and their size.
const HUGE_PAGE: usize = 2 << 20;
const CACHE_LINE: usize = 64;

pub(crate) struct Memory {
    data: std::ptr::NonNull<u8>,
    layout: Layout,
}

// SAFETY: the memory is owned by this value alone, and it is only written through `&mut self`.
unsafe impl Send for Memory {}
// SAFETY: see above.
unsafe impl Sync for Memory {}

impl Memory {
    pub(crate) fn zeroed(bytes: usize, what: &'static str) -> Result<Self, Error> {
        let align = if bytes >= HUGE_PAGE { HUGE_PAGE } else { CACHE_LINE };
        let layout = Layout::from_size_align(bytes.max(1), align).map_err(|_| Error::Memory(what))?;
        // SAFETY: the size of the layout is not zero.
        let data = unsafe { alloc::alloc_zeroed(layout) };
        let data = std::ptr::NonNull::new(data).ok_or(Error::Memory(what))?;
        if align == HUGE_PAGE {
            ffi::advise_huge_pages(data.as_ptr(), layout.size());
        }
        Ok(Self { data, layout })
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the memory has this size, is initialised, and is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.layout.size()) }
    }

    pub(crate) fn as_ptr(&self) -> *const u8 {
        self.data.as_ptr()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `zeroed`.
        unsafe { alloc::dealloc(self.data.as_ptr(), self.layout) }
    }
}
