//! Objects to reconcile, from any watch. An object that is named several times before it is taken is taken once, so the
//! queue is never longer than the number of objects.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use futures::{Stream, StreamExt, stream, task::AtomicWaker};
use kube::{Resource, runtime::reflector::ObjectRef};

/// The queue. Clones share it.
pub struct Wakes<K: Resource<DynamicType = ()>>(Arc<Inner<K>>);

struct Inner<K: Resource<DynamicType = ()>> {
    waiting: Mutex<HashSet<ObjectRef<K>>>,
    waker: AtomicWaker,
}

impl<K: Resource<DynamicType = ()>> Clone for Wakes<K> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<K: Resource<DynamicType = ()>> Default for Wakes<K> {
    fn default() -> Self {
        Self(Arc::new(Inner { waiting: Mutex::default(), waker: AtomicWaker::new() }))
    }
}

impl<K: Resource<DynamicType = ()> + Send + 'static> Wakes<K> {
    /// Names objects to reconcile.
    pub fn wake(&self, objects: impl IntoIterator<Item = ObjectRef<K>>) {
        self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner).extend(objects);
        self.0.waker.wake();
    }

    fn poll(&self, context: &mut Context<'_>) -> Poll<HashSet<ObjectRef<K>>> {
        // Registered before the look, so that nothing that comes in between is missed.
        self.0.waker.register(context.waker());
        let waiting = std::mem::take(&mut *self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner));
        if waiting.is_empty() { Poll::Pending } else { Poll::Ready(waiting) }
    }

    /// Returns the objects as a stream without an end. Only one may be polled.
    pub fn stream(self) -> impl Stream<Item = ObjectRef<K>> + Send + 'static {
        stream::poll_fn(move |context| self.poll(context).map(Some)).flat_map(stream::iter)
    }
}

#[cfg(test)]
mod tests {
    use athanor_crds::FineTuneJob;
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn an_object_named_twice_is_taken_once() {
        let wakes = Wakes::<FineTuneJob>::default();
        let mut taken = Box::pin(wakes.clone().stream());
        assert!(taken.next().now_or_never().is_none());
        let object = |name: &str| ObjectRef::new(name).within("ns");
        let waiting = tokio::spawn(async move {
            let mut names = [taken.next().await.unwrap().name, taken.next().await.unwrap().name];
            names.sort();
            (names, taken.next().now_or_never().is_none())
        });
        wakes.wake([object("a"), object("b"), object("a")]);
        assert_eq!(waiting.await.unwrap(), (["a".to_owned(), "b".to_owned()], true));
    }
}
