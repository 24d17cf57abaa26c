//! Adam on an embedding table of which each step reads few rows.

use tch::{Kind, Tensor};

use crate::{Error, Rule, ffi};

/// Adam or AdamW on an embedding table [V, C] (FP32 on the CPU) whose gradient is zero except for some rows. It
/// computes the same numbers as the rule on the whole table, at the cost of these rows. The steps at which a row had no
/// gradient (moments and weight decay go on) are made up for, by the same operations, when the row is read next.
pub struct EmbeddingAdam {
    table: Tensor,
    /// First and second moments, [V, C].
    moments: [Tensor; 2],
    betas: [f64; 2],
    epsilon: f64,
    weight_decay: f64,
    /// Steps that each row has been through, [V].
    steps_of_row: Vec<i64>,
    /// Steps before the first of `recent`; every row has been through these.
    base: i64,
    /// The coefficients of each step since.
    recent: Vec<ffi::AdamStep>,
}

impl EmbeddingAdam {
    /// The state starts at zero. Returns `None` for rules other than Adam without weight decay and AdamW.
    pub fn new(table: &Tensor, rule: Rule, weight_decay: f64) -> Option<Self> {
        let (betas, epsilon, weight_decay) = match rule {
            Rule::Adam { beta1, beta2, epsilon } if weight_decay == 0.0 => ([beta1, beta2], epsilon, 0.0),
            Rule::AdamW { beta1, beta2, epsilon } => ([beta1, beta2], epsilon, weight_decay),
            _ => return None,
        };
        let table = table.detach();
        let rows = usize::try_from(*table.size().first()?).ok()?;
        let moments = [table.zeros_like(), table.zeros_like()];
        Some(Self {
            moments,
            table,
            betas,
            epsilon,
            weight_decay,
            steps_of_row: vec![0; rows],
            base: 0,
            recent: Vec::new(),
        })
    }

    /// Brings rows up to date, before they are read.
    pub fn catch_up(&mut self, rows: &[i64]) -> Result<(), Error> {
        self.run(rows, None)
    }

    /// Brings the whole table up to date, before it is read or saved.
    pub fn catch_up_all(&mut self) -> Result<(), Error> {
        let all: Vec<i64> = (0..self.steps_of_row.len() as i64).collect();
        self.run(&all, None)?;
        self.base += self.recent.len() as i64;
        self.recent.clear();
        Ok(())
    }

    /// One step. `rows` must be up to date and contain no row twice; `gradients` [rows, C] are their gradients. The
    /// gradients of all other rows are zero.
    pub fn step(&mut self, rows: &[i64], gradients: &Tensor, learning_rate: f64) -> Result<(), Error> {
        self.recent.push(self.coefficients(self.base + self.recent.len() as i64 + 1, learning_rate));
        self.run(rows, Some(gradients))
    }

    /// The coefficients of a step, counted from 1.
    fn coefficients(&self, step: i64, learning_rate: f64) -> ffi::AdamStep {
        let [beta1, beta2] = self.betas;
        let step = step as f64;
        ffi::AdamStep {
            keep: (1.0 - learning_rate * self.weight_decay) as f32,
            beta1_rest: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            beta2_rest: (1.0 - beta2) as f32,
            size: (learning_rate / (1.0 - beta1.powf(step))) as f32,
            second_scale: (1.0 / (1.0 - beta2.powf(step)).sqrt()) as f32,
            epsilon: self.epsilon as f32,
        }
    }

    /// Takes rows through all steps that they have not been through. `gradients` are those of the last step.
    fn run(&mut self, rows: &[i64], gradients: Option<&Tensor>) -> Result<(), Error> {
        let [first, second] = &self.moments;
        let gradients = gradients.map(|gradients| gradients.to_kind(Kind::Float).contiguous());
        ffi::call(|message| {
            // SAFETY: the tensors and lists are alive for the call; the shim checks shapes and rows, and writes to
            // `steps_of_row` within its length, which is the table's number of rows.
            unsafe {
                ffi::athanor_embedding_adam(
                    ffi::pointer(&self.table),
                    ffi::pointer(first),
                    ffi::pointer(second),
                    gradients.as_ref().map_or(std::ptr::null_mut(), ffi::pointer),
                    rows.as_ptr(),
                    rows.len(),
                    self.steps_of_row.as_mut_ptr(),
                    self.base,
                    self.recent.as_ptr(),
                    self.recent.len(),
                    message,
                )
            }
        })
    }

    /// The state as named tensors, sharing memory except for the counter; up to date after
    /// [`EmbeddingAdam::catch_up_all`]. They are those that an [`Optimizer`](crate::Optimizer) has for the parameter of
    /// this name.
    pub fn state(&self, name: &str) -> Vec<(String, Tensor)> {
        let [first, second] = self.moments.each_ref().map(Tensor::shallow_clone);
        let step = Tensor::from(self.base as f32);
        [("exp_avg", first), ("exp_avg_sq", second), ("step", step)]
            .map(|(what, tensor)| (format!("{name}.{what}"), tensor))
            .into()
    }

    /// Overwrites the state with what [`EmbeddingAdam::state`] returned.
    pub fn load_state(&mut self, name: &str, mut find: impl FnMut(&str) -> Option<Tensor>) -> Result<(), Error> {
        for (name, mut tensor) in self.state(name) {
            let saved = find(&name)
                .filter(|saved| saved.size() == tensor.size())
                .ok_or_else(|| Error::Torch(format!("optimizer state {name} is missing or has another shape")))?;
            if name.ends_with(".step") {
                self.base = f64::try_from(saved)? as i64;
            } else {
                tensor.f_copy_(&saved)?;
            }
        }
        self.recent.clear();
        self.steps_of_row.fill(self.base);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::{Optimizer, ParameterGroup, Shard, backward, zero_grad};

    const RULE: Rule = Rule::AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 };

    /// Steps that each read some rows of a table, at a learning rate.
    fn steps() -> Vec<(Vec<i64>, f64)> {
        let rows = [vec![0, 3], vec![3], vec![1, 2, 3], vec![0], vec![2, 4], vec![0, 1]];
        rows.into_iter().zip([0.1, 0.09, 0.08, 0.07, 0.06, 0.05]).collect()
    }

    fn table() -> Tensor {
        Tensor::arange(6 * 40, (Kind::Float, Device::Cpu)).view([6, 40]).sin()
    }

    /// The gradient of row r depends on its values, so that a row which is out of date would show.
    fn loss(rows: &Tensor) -> Tensor {
        (rows.square() * rows.cos()).sum(Kind::Float)
    }

    fn run(adam: &mut EmbeddingAdam, table: &Tensor, steps: &[(Vec<i64>, f64)]) {
        for (rows, rate) in steps {
            adam.catch_up(rows).unwrap();
            let read = table.index_select(0, &Tensor::from_slice(rows)).detach().set_requires_grad(true);
            backward(&loss(&read)).unwrap();
            adam.step(rows, &read.grad(), *rate).unwrap();
        }
        adam.catch_up_all().unwrap();
    }

    #[test]
    fn equals_the_whole_tables_steps() {
        for (rule, weight_decay) in [(RULE, 0.1), (Rule::Adam { beta1: 0.8, beta2: 0.99, epsilon: 1e-6 }, 0.0)] {
            let whole = table().set_requires_grad(true);
            let group = ParameterGroup { weight_decay, parameters: vec![("table".to_owned(), whole.shallow_clone())] };
            let mut optimizer = Optimizer::new(rule, vec![group], Shard::WHOLE).unwrap();
            for (rows, rate) in steps() {
                zero_grad(&[whole.shallow_clone()]).unwrap();
                backward(&loss(&whole.index_select(0, &Tensor::from_slice(&rows)))).unwrap();
                optimizer.step(rate).unwrap();
            }
            let by_rows = table();
            let mut adam = EmbeddingAdam::new(&by_rows, rule, weight_decay).unwrap();
            run(&mut adam, &by_rows, &steps());
            // Another kernel, which may contract to fused multiply-adds: last bits of FP32 over six steps.
            assert!(by_rows.allclose(&whole.detach(), 1e-6, 1e-7, false));
            // Row 5 was never read: it decays alone.
            assert_eq!(by_rows.get(5) == table().get(5), weight_decay == 0.0);
        }
    }

    #[test]
    fn catching_up_and_resuming_change_nothing() {
        let (together, apart) = (table(), table());
        run(&mut EmbeddingAdam::new(&together, RULE, 0.1).unwrap(), &together, &steps());
        let mut begun = EmbeddingAdam::new(&apart, RULE, 0.1).unwrap();
        run(&mut begun, &apart, &steps()[..2]);
        let saved = begun.state("table");
        let mut resumed = EmbeddingAdam::new(&apart, RULE, 0.1).unwrap();
        let find = |name: &str| saved.iter().find(|(known, _)| known == name).map(|(_, tensor)| tensor.copy());
        resumed.load_state("table", find).unwrap();
        run(&mut resumed, &apart, &steps()[2..]);
        assert_eq!(together, apart);
    }

    #[test]
    fn refuses_other_rules_and_rows_that_are_not_there() {
        assert!(EmbeddingAdam::new(&table(), Rule::Sgd { momentum: 0.0 }, 0.0).is_none());
        assert!(EmbeddingAdam::new(&table(), Rule::Adam { beta1: 0.9, beta2: 0.9, epsilon: 1e-8 }, 0.1).is_none());
        let mut adam = EmbeddingAdam::new(&table(), RULE, 0.0).unwrap();
        assert!(adam.catch_up(&[6]).is_err());
        assert!(adam.step(&[1], &Tensor::zeros([2, 40], (Kind::Float, Device::Cpu)), 0.1).is_err());
    }
}
