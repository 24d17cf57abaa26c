use std::sync::mpsc as std_mpsc;

use super::*;

/// Reserves and runs.
async fn run(engine: &Engine, rows: Vec<Vec<u32>>) -> Result<Vec<Output>, EngineError> {
    let places = engine.reserve(rows.len())?;
    engine.run(places, rows).await
}

/// Logits are the first token and the length, so an answer shows which input it belongs to; each call waits for a turn.
struct Paced {
    turns: std_mpsc::Receiver<()>,
    sizes: std_mpsc::Sender<usize>,
}

impl EncodeBackend for Paced {
    fn forward(&mut self, rows: &[&[u32]]) -> Result<Vec<Vec<f32>>, BackendError> {
        self.sizes.send(rows.len()).map_err(|error| BackendError(error.to_string()))?;
        self.turns.recv().map_err(|error| BackendError(error.to_string()))?;
        Ok(rows.iter().map(|row| vec![row[0] as f32, row.len() as f32]).collect())
    }
}

fn limits(queue_inputs: usize) -> ServeLimits {
    ServeLimits { max_inputs: 2, queue_inputs, max_batch_inputs: 8, max_batch_tokens: 1000, ..ServeLimits::default() }
}

/// Waits until the model is given a batch and says how large it is.
async fn begun(sizes: &std_mpsc::Receiver<usize>) -> usize {
    loop {
        match sizes.try_recv() {
            Ok(size) => return size,
            Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
        }
    }
}

async fn until_waiting(engine: &Engine, inputs: usize) {
    while engine.waiting() < inputs {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn spawn(engine: &Engine, rows: Vec<Vec<u32>>) -> tokio::task::JoinHandle<Result<Vec<Output>, EngineError>> {
    let engine = engine.clone();
    tokio::spawn(async move { run(&engine, rows).await })
}

#[tokio::test]
async fn what_waits_shares_a_batch_and_answers_keep_their_order() {
    let (turn, turns) = std_mpsc::channel();
    let (sizes, batches) = std_mpsc::channel();
    let engine = Engine::start(Paced { turns, sizes }, &limits(100)).unwrap();
    let first = spawn(&engine, vec![vec![1]]);
    assert_eq!(begun(&batches).await, 1);
    // All others come while the first batch runs.
    let others: Vec<_> = (2..6).map(|id| spawn(&engine, vec![vec![id, 0, 0], vec![0]])).collect();
    until_waiting(&engine, 8).await;
    for _ in 0..10 {
        turn.send(()).unwrap();
    }
    first.await.unwrap().unwrap();
    for (id, other) in (2..6).zip(others) {
        let outputs = other.await.unwrap().unwrap();
        assert_eq!(outputs[0].logits, [id as f32, 3.0], "input {id}");
        assert_eq!(outputs[1].logits, [0.0, 1.0], "input {id}");
    }
    assert_eq!(batches.try_iter().collect::<Vec<_>>(), [8]);
    assert_eq!(engine.waiting(), 0);
}

#[tokio::test]
async fn a_full_queue_refuses_and_a_request_that_went_away_leaves_it() {
    let (turn, turns) = std_mpsc::channel();
    let (sizes, batches) = std_mpsc::channel();
    let engine = Engine::start(Paced { turns, sizes }, &limits(2)).unwrap();
    let running = spawn(&engine, vec![vec![1]]);
    begun(&batches).await;
    let waiting = spawn(&engine, vec![vec![2], vec![3]]);
    until_waiting(&engine, 2).await;
    assert!(matches!(run(&engine, vec![vec![4]]).await, Err(EngineError::QueueFull { capacity: 2 })));
    waiting.abort();
    assert!(waiting.await.unwrap_err().is_cancelled());
    for _ in 0..4 {
        turn.send(()).unwrap();
    }
    running.await.unwrap().unwrap();
    while run(&engine, vec![vec![5]]).await.is_err() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    // The model never saw the request that went away.
    assert_eq!(batches.try_iter().collect::<Vec<_>>(), [1]);
}

#[tokio::test]
async fn a_failing_model_fails_its_batch_and_a_panicking_one_stops_the_engine() {
    struct Bad;
    impl EncodeBackend for Bad {
        fn forward(&mut self, rows: &[&[u32]]) -> Result<Vec<Vec<f32>>, BackendError> {
            assert!(rows[0][0] != 13, "a fault of the test");
            Err(BackendError("out of memory".into()))
        }
    }
    let engine = Engine::start(Bad, &limits(10)).unwrap();
    let error = run(&engine, vec![vec![1]]).await.unwrap_err();
    assert_eq!(error.to_string(), "the model failed: out of memory");
    assert!(matches!(run(&engine, vec![vec![13]]).await, Err(EngineError::Stopped)));
    engine.stopped().await;
    assert!(matches!(run(&engine, vec![vec![1]]).await, Err(EngineError::Stopped)));
}
