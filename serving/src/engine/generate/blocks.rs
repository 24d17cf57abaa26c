//! The blocks of the key-value cache: who uses which, and which full blocks can be shared.
//!
//! A full block is found by the identity of the block before it and by its own tokens. The chain of identities plays
//! the part that chained hashes play elsewhere; since the map compares whole keys, a hash collision cannot hand out a
//! block of another prefix. A released full block keeps its content until its place is needed, the least recently used
//! first.

use std::collections::{BTreeMap, HashMap};

use crate::engine::backend::AdapterId;

/// Identity of a prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Prefix {
    /// The prefix without tokens. Keys and values depend on the adapter, so each adapter has prefixes of its own.
    Empty(Option<AdapterId>),
    /// Content of a full block, hence the whole prefix up to its end. Never reused.
    Block(u64),
}

#[derive(Debug)]
struct Content {
    parent: Prefix,
    own: Prefix,
    tokens: Box<[u32]>,
}

#[derive(Debug, Default)]
struct Block {
    references: u32,
    /// Present if the block is full and can be found by others.
    content: Option<Content>,
    /// Key in `Blocks::reusable` while the block has content and no reference.
    released: u64,
}

/// A fixed number of blocks of a fixed size.
#[derive(Debug)]
pub struct Blocks {
    size: usize,
    blocks: Vec<Block>,
    /// Blocks without reference and without content.
    empty: Vec<u32>,
    /// Blocks without reference that keep their content, the least recently released first.
    reusable: BTreeMap<u64, u32>,
    cached: HashMap<(Prefix, Box<[u32]>), u32>,
    releases: u64,
    identities: u64,
}

impl Blocks {
    /// # Panics
    /// If `size` is zero.
    pub fn new(count: usize, size: usize) -> Self {
        assert!(size > 0, "a block has at least one position");
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        Self {
            size,
            blocks: (0..count).map(|_| Block::default()).collect(),
            empty: (0..count).rev().collect(),
            reusable: BTreeMap::new(),
            cached: HashMap::new(),
            releases: 0,
            identities: 0,
        }
    }

    /// Number of positions in a block.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Number of blocks.
    pub fn count(&self) -> usize {
        self.blocks.len()
    }

    /// Number of blocks without a reference.
    pub fn free(&self) -> usize {
        self.empty.len() + self.reusable.len()
    }

    /// Number of blocks with a reference.
    pub fn used(&self) -> usize {
        self.count() - self.free()
    }

    /// Number of blocks that `tokens` positions occupy.
    pub fn needed(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.size)
    }

    /// Number of references to a block.
    pub fn references(&self, block: u32) -> u32 {
        self.blocks[block as usize].references
    }

    /// Finds the longest cached prefix of `tokens` in full blocks. It leaves at least one token out, because a sequence
    /// has to compute its last token to get logits.
    ///
    /// `root`: the empty prefix of the sequence.
    pub fn find(&self, root: Prefix, tokens: &[u32]) -> Vec<u32> {
        let full = tokens.len().saturating_sub(1) / self.size;
        let mut prefix = root;
        let mut found = Vec::new();
        for chunk in tokens.chunks_exact(self.size).take(full) {
            let Some(&block) = self.cached.get(&(prefix, Box::from(chunk))) else { break };
            let Some(content) = &self.blocks[block as usize].content else { break };
            prefix = content.own;
            found.push(block);
        }
        found
    }

    /// Identity of the prefix that ends with the last of these sealed blocks; `root` without blocks.
    pub fn prefix(&self, root: Prefix, blocks: &[u32]) -> Prefix {
        let content = blocks.last().and_then(|&block| self.blocks[block as usize].content.as_ref());
        content.map_or(root, |content| content.own)
    }

    /// Allocates the table of a sequence that continues from `shared` (from [`Blocks::find`]) and has `tokens` tokens.
    /// Returns nothing, and changes nothing, if too few blocks are free.
    pub fn allocate(&mut self, shared: &[u32], tokens: usize) -> Option<Vec<u32>> {
        let fresh = self.needed(tokens).saturating_sub(shared.len());
        let revived = shared.iter().filter(|&&block| self.references(block) == 0).count();
        if fresh + revived > self.free() {
            return None;
        }
        let mut table = Vec::with_capacity(shared.len() + fresh);
        for &block in shared {
            let state = &mut self.blocks[block as usize];
            if state.references == 0 {
                self.reusable.remove(&state.released);
            }
            state.references += 1;
            table.push(block);
        }
        for _ in 0..fresh {
            table.push(self.take()?);
        }
        Some(table)
    }

    /// Appends blocks until `table` covers `tokens` positions. Returns false, and changes nothing, if too few blocks
    /// are free.
    pub fn extend(&mut self, table: &mut Vec<u32>, tokens: usize) -> bool {
        let missing = self.needed(tokens).saturating_sub(table.len());
        if missing > self.free() {
            return false;
        }
        table.extend((0..missing).map_while(|_| self.take()));
        true
    }

    /// Gives up the blocks of a table behind its first `tokens` positions.
    pub fn trim(&mut self, table: &mut Vec<u32>, tokens: usize) {
        let mut surplus = table.split_off(self.needed(tokens).min(table.len()));
        self.release(&mut surplus);
    }

    /// Takes a free block, an empty one before one with content.
    fn take(&mut self) -> Option<u32> {
        let block = match self.empty.pop() {
            Some(block) => block,
            None => {
                let (_, block) = self.reusable.pop_first()?;
                if let Some(content) = self.blocks[block as usize].content.take() {
                    self.cached.remove(&(content.parent, content.tokens));
                }
                block
            }
        };
        self.blocks[block as usize].references = 1;
        Some(block)
    }

    /// Makes a computed, full block available to other sequences. Returns the identity that its successor is sealed
    /// with. If another block already has this content, that one stays the shared one.
    pub fn seal(&mut self, block: u32, parent: Prefix, tokens: &[u32]) -> Prefix {
        debug_assert_eq!(tokens.len(), self.size);
        if let Some(content) = &self.blocks[block as usize].content {
            return content.own;
        }
        let key = (parent, Box::<[u32]>::from(tokens));
        if let Some(&other) = self.cached.get(&key)
            && let Some(content) = &self.blocks[other as usize].content
        {
            return content.own;
        }
        self.identities += 1;
        let own = Prefix::Block(self.identities);
        self.blocks[block as usize].content = Some(Content { parent, own, tokens: key.1.clone() });
        self.cached.insert(key, block);
        own
    }

    /// Gives up one reference to each block of a table. The last blocks are released first, so that the end of a prefix
    /// is evicted before its beginning, without which it cannot be found.
    ///
    /// # Panics
    /// If a block has no reference.
    pub fn release(&mut self, table: &mut Vec<u32>) {
        while let Some(block) = table.pop() {
            let state = &mut self.blocks[block as usize];
            assert!(state.references > 0, "block {block} is released twice");
            state.references -= 1;
            if state.references > 0 {
                continue;
            }
            if state.content.is_some() {
                self.releases += 1;
                state.released = self.releases;
                self.reusable.insert(self.releases, block);
            } else {
                self.empty.push(block);
            }
        }
    }
}

#[cfg(test)]
#[path = "blocks_tests.rs"]
mod tests;
