//! Sees every version of objects: unlike polling, a watch misses none, and goes on after an API server was away.

use std::{fmt::Debug, pin::pin, time::Duration};

use futures::StreamExt;
use kube::{
    Api, Resource,
    runtime::watcher::{self, Event},
};
use serde::de::DeserializeOwned;
use tokio::task::JoinHandle;

/// Between two attempts at an API server that does not answer.
const AGAIN: Duration = Duration::from_millis(200);

/// A watch that ends when it is dropped.
pub struct Following(JoinHandle<()>);

impl Drop for Following {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Calls `see` with each version of the objects that `config` selects, deleted ones included.
pub fn follow<K>(api: Api<K>, config: watcher::Config, see: impl Fn(&K) + Send + 'static) -> Following
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    Following(tokio::spawn(async move {
        let mut events = pin!(watcher::watcher(api, config));
        while let Some(event) = events.next().await {
            match event {
                Ok(Event::Apply(object) | Event::InitApply(object) | Event::Delete(object)) => see(&object),
                Ok(Event::Init | Event::InitDone) => {}
                Err(_) => tokio::time::sleep(AGAIN).await,
            }
        }
    }))
}
