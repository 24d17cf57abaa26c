//! The table of word embeddings.

use tch::Tensor;

/// The table of word embeddings.
pub struct WordEmbeddings {
    /// [V, C].
    pub weight: Tensor,
    rows: Option<EmbeddingRows>,
}

/// Rows of a table, read in its place: their gradient is small where the table's would be large and mostly zero.
pub struct EmbeddingRows {
    /// Where each row of the table is in `rows`, [V]; anything for one that is not.
    pub places: Tensor,
    /// [rows, C], the padding token's first.
    pub rows: Tensor,
}

impl WordEmbeddings {
    pub fn new(weight: Tensor) -> Self {
        Self { weight, rows: None }
    }

    pub fn set_rows(&mut self, rows: Option<EmbeddingRows>) {
        self.rows = rows;
    }

    /// Ids [B, T] to vectors [B, T, C].
    pub fn forward(&self, ids: &Tensor, pad_token_id: i64) -> Tensor {
        match &self.rows {
            Some(EmbeddingRows { places, rows }) => Tensor::embedding(rows, &places.take(ids), 0, false, false),
            None => Tensor::embedding(&self.weight, ids, pad_token_id, false, false),
        }
    }
}
