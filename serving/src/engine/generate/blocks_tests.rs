use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

const ROOT: Prefix = Prefix::Empty(None);

fn seal_all(blocks: &mut Blocks, table: &[u32], tokens: &[u32]) {
    let size = blocks.size();
    let mut prefix = ROOT;
    for (chunk, &block) in tokens.chunks_exact(size).zip(table) {
        prefix = blocks.seal(block, prefix, chunk);
    }
}

#[test]
fn a_prefix_of_full_blocks_is_shared_and_the_last_token_is_always_computed() {
    let mut blocks = Blocks::new(8, 2);
    let tokens = [1, 2, 3, 4, 5];
    let table = blocks.allocate(&[], 5).unwrap();
    assert_eq!((table.len(), blocks.used()), (3, 3));
    seal_all(&mut blocks, &table, &tokens);
    for (case, tokens, shared) in [
        ("same tokens", &[1, 2, 3, 4, 5][..], 2),
        ("ends with a full block", &[1, 2, 3, 4], 1),
        ("longer", &[1, 2, 3, 4, 5, 6, 7], 2),
        ("another second block", &[1, 2, 3, 5, 5], 1),
        ("the second block's tokens first", &[3, 4, 3, 4, 5], 0),
        ("too short", &[1, 2], 0),
        ("nothing", &[], 0),
    ] {
        assert_eq!(blocks.find(ROOT, tokens), table[..shared], "{case}");
    }
}

#[test]
fn equal_tokens_after_different_prefixes_are_different_blocks() {
    let mut blocks = Blocks::new(8, 2);
    let first = blocks.allocate(&[], 4).unwrap();
    seal_all(&mut blocks, &first, &[1, 1, 7, 7]);
    let second = blocks.allocate(&[], 4).unwrap();
    seal_all(&mut blocks, &second, &[2, 2, 7, 7]);
    assert_eq!(blocks.find(ROOT, &[1, 1, 7, 7, 0]), first);
    assert_eq!(blocks.find(ROOT, &[2, 2, 7, 7, 0]), second);
}

#[test]
fn released_blocks_keep_their_content_until_it_is_needed_the_oldest_and_deepest_first() {
    let mut blocks = Blocks::new(4, 2);
    let mut old = blocks.allocate(&[], 4).unwrap();
    seal_all(&mut blocks, &old, &[1, 1, 2, 2]);
    let mut new = blocks.allocate(&[], 4).unwrap();
    seal_all(&mut blocks, &new, &[3, 3, 4, 4]);
    blocks.release(&mut old);
    blocks.release(&mut new);
    assert_eq!((blocks.free(), blocks.used()), (4, 0));
    assert_eq!(blocks.find(ROOT, &[1, 1, 2, 2, 0]).len(), 2);
    let mut one = blocks.allocate(&[], 1).unwrap();
    assert_eq!(blocks.find(ROOT, &[1, 1, 2, 2, 0]).len(), 1, "the end of the older prefix was evicted");
    assert_eq!(blocks.find(ROOT, &[3, 3, 4, 4, 0]).len(), 2);
    blocks.release(&mut one);
    // Revived blocks count against the free ones: three are needed, two of them shared.
    let shared = blocks.find(ROOT, &[3, 3, 4, 4, 0]);
    let table = blocks.allocate(&shared, 5).unwrap();
    assert_eq!((&table[..2], blocks.free()), (&shared[..], 1));
    assert_eq!(blocks.allocate(&[], 3), None);
    assert_eq!(blocks.free(), 1, "a refused allocation changes nothing");
}

#[test]
fn a_block_computed_twice_is_shared_once_and_the_chain_goes_on() {
    let mut blocks = Blocks::new(8, 2);
    let first = blocks.allocate(&[], 2).unwrap();
    let second = blocks.allocate(&[], 4).unwrap();
    seal_all(&mut blocks, &first, &[1, 1]);
    seal_all(&mut blocks, &second, &[1, 1, 2, 2]);
    assert_eq!(blocks.find(ROOT, &[1, 1, 2, 2, 0]), [first[0], second[1]]);
}

#[derive(Clone, Debug)]
enum Action {
    /// Starts a sequence of these tokens.
    Start(Vec<u32>),
    /// Appends a token to a running sequence.
    Grow(usize, u32),
    End(usize),
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        proptest::collection::vec(0u32..2, 1..12).prop_map(Action::Start),
        (0usize..8, 0u32..2).prop_map(|(index, token)| Action::Grow(index, token)),
        (0usize..8).prop_map(Action::End),
    ]
}

/// References equal owners; free and used blocks are all blocks; a block with two owners holds the same full prefix in
/// both.
fn check(blocks: &Blocks, running: &[(Vec<u32>, Vec<u32>)]) {
    let mut owners: HashMap<u32, Vec<(usize, &[u32])>> = HashMap::new();
    for (tokens, table) in running {
        assert_eq!(table.len(), blocks.needed(tokens.len()));
        for (index, block) in table.iter().enumerate() {
            let end = (index + 1) * blocks.size();
            owners.entry(*block).or_default().push((end, &tokens[..end.min(tokens.len())]));
        }
    }
    for block in 0..blocks.count() as u32 {
        let owners = owners.get(&block).map_or(&[][..], Vec::as_slice);
        assert_eq!(blocks.references(block) as usize, owners.len(), "block {block}");
        if owners.len() > 1 {
            assert!(owners.iter().all(|(end, prefix)| prefix.len() == *end && *prefix == owners[0].1), "{owners:?}");
        }
    }
    assert_eq!(blocks.used(), owners.len());
    assert_eq!(blocks.free() + blocks.used(), blocks.count());
}

proptest! {
    #[test]
    fn owners_and_references_agree_after_any_sequence_of_calls(actions in proptest::collection::vec(action(), 0..80)) {
        let mut blocks = Blocks::new(9, 3);
        let mut running: Vec<(Vec<u32>, Vec<u32>)> = Vec::new();
        for action in actions {
            match action {
                Action::Start(tokens) => {
                    let shared = blocks.find(ROOT, &tokens);
                    if let Some(table) = blocks.allocate(&shared, tokens.len()) {
                        seal_all(&mut blocks, &table, &tokens);
                        running.push((tokens, table));
                    }
                }
                Action::Grow(index, token) => if let Some((tokens, table)) = running.get_mut(index)
                    && blocks.extend(table, tokens.len() + 1)
                {
                    tokens.push(token);
                    seal_all(&mut blocks, table, tokens);
                },
                Action::End(index) => if index < running.len() {
                    blocks.release(&mut running.remove(index).1);
                },
            }
            check(&blocks, &running);
        }
        for (_, mut table) in running {
            blocks.release(&mut table);
        }
        prop_assert_eq!(blocks.free(), 9);
    }
}
