//! One session: from the published ranges through Kafka to the status, until an error or another configuration ends it. Of the
//! revisions it depends on the first alone, so that a candidate that comes or goes ends none.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use athanor_contract::{
    artifact::{REFERENCE, Reference},
    monitor::{MonitorConfig, MonitorStatus, MonitoredRevision, Verdict},
};
use athanor_feedback::{
    cloudevents,
    kafka::{LogContext, consumer_config, is_unknown_topic},
    signing::SharedKeys,
    window::{CONFIDENCE_KS, LABELLED_ACCURACY, POSITIVE_RATINGS, PREDICTION_PSI, Window},
};
use athanor_store::StoreError;
use athanor_telemetry::Readiness;
use rdkafka::{
    Message, Offset, TopicPartitionList,
    consumer::{CommitMode, Consumer, StreamConsumer},
    error::KafkaError,
    message::BorrowedMessage,
};
use tokio::{sync::watch, time::MissedTickBehavior};
use tokio_util::task::AbortOnDropHandle;

use super::{config::PAUSE, publisher::Publisher};

/// Time limit of one question to the broker.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// Between looks at the ends of the partitions, and at their number.
const LAG_PERIOD: Duration = Duration::from_secs(5);

type KafkaConsumer = Arc<StreamConsumer<LogContext>>;
/// Partition to the offsets of its first event and after its last one.
type Ends = BTreeMap<i32, (i64, i64)>;
/// Between two publications in which nothing but counts is new.
const BETWEEN_COUNTS: Duration = Duration::from_secs(5);

pub struct Session {
    config: MonitorConfig,
    keys: Option<SharedKeys>,
}

/// What a session knows while it runs.
struct Running<'a> {
    config: &'a MonitorConfig,
    keys: Option<&'a SharedKeys>,
    consumer: KafkaConsumer,
    publisher: Publisher,
    published: MonitorStatus,
    published_at: Option<Instant>,
    window: Window,
    /// Partition to the next offset.
    positions: BTreeMap<i32, i64>,
    /// Published ends that were not reached yet. Until then the status says more than the window does, and is left alone.
    catching_up: BTreeMap<i32, i64>,
    /// The window has taken over what was published.
    is_resumed: bool,
    /// Positions have moved since the last commit.
    uncommitted: bool,
    /// It was said that no label confirms an answer.
    has_warned: bool,
}

impl Session {
    /// Without `keys` signatures are not verified.
    pub fn new(config: MonitorConfig, keys: Option<SharedKeys>) -> Self {
        Self { config, keys }
    }

    /// Ends with an error, or when the topic got more partitions.
    pub async fn run(&self, readiness: &Readiness) -> anyhow::Result<()> {
        let revision = self.config.revisions.first().context("no revision to watch")?;
        let reference = read_reference(revision).await?;
        let publisher = Publisher::connect(&self.config.namespace, &self.config.deployment).await?;
        // Alive and watching, though Kafka may be away.
        readiness.set(true);
        let topic = &self.config.events.topic;
        // Offsets of another topic say nothing about this one.
        let published = publisher.read().await?.filter(|status| status.topic.is_empty() || status.topic == *topic);
        let published = published.unwrap_or_default();
        let (consumer, positions) = self.open(&published).await?;
        let share = self.config.events.maximum_caller_percent;
        let window = Window::new(&revision.name, reference, self.config.windows.clone(), share);
        let same_revision = published.revision == revision.name;
        let known = |partition| positions.contains_key(partition);
        let ranges = published.ranges.iter().filter(|range| same_revision && known(&range.partition));
        let catching_up = ranges.map(|range| (range.partition, range.end)).collect();
        let config = &self.config;
        let uncommitted = false;
        Running {
            config,
            keys: self.keys.as_ref(),
            consumer,
            publisher,
            published,
            published_at: None,
            window,
            positions,
            catching_up,
            is_resumed: false,
            uncommitted,
            has_warned: false,
        }
        .run()
        .await
    }

    /// A consumer that begins where the revision's ranges do; where there are none, at the bookmark.
    async fn open(&self, published: &MonitorStatus) -> anyhow::Result<(KafkaConsumer, BTreeMap<i32, i64>)> {
        let MonitorConfig { namespace, deployment, events, revisions, .. } = &self.config;
        let group = format!("athanor-monitor.{namespace}.{deployment}");
        let consumer: StreamConsumer<LogContext> =
            consumer_config(&events.bootstrap_servers, &group).create_with_context(LogContext)?;
        let consumer = Arc::new(consumer);
        let ranges = match revisions.first().is_some_and(|revision| revision.name == published.revision) {
            true => published.ranges.clone(),
            false => Vec::new(),
        };
        let (topic, asked) = (events.topic.clone(), consumer.clone());
        let assignment = blocking(move || {
            let mut assignment = TopicPartitionList::new();
            for partition in partitions(&asked, &topic)? {
                assignment.add_partition(&topic, partition);
            }
            let bookmarks = asked.committed_offsets(assignment, ASK_TIMEOUT).context("no bookmarks")?;
            let mut assignment = TopicPartitionList::new();
            for bookmark in bookmarks.elements() {
                let partition = bookmark.partition();
                let offset = match (ranges.iter().find(|range| range.partition == partition), bookmark.offset()) {
                    (Some(range), _) => Offset::Offset(range.begin),
                    (None, Offset::Offset(offset)) => Offset::Offset(offset),
                    (None, _) => Offset::Beginning,
                };
                assignment.add_partition_offset(&topic, partition, offset)?;
            }
            asked.assign(&assignment)?;
            Ok(assignment)
        })
        .await
        .with_context(|| format!("topic {} at {} cannot be read yet", events.topic, events.bootstrap_servers))?;
        let begins = assignment
            .elements()
            .iter()
            .map(|begin| (begin.partition(), begin.offset().to_raw().unwrap_or(0).max(0)))
            .collect();
        Ok((consumer, begins))
    }
}

impl Running<'_> {
    async fn run(mut self) -> anyhow::Result<()> {
        let (ends, _watching) = watch_ends(self.consumer.clone(), self.config.events.topic.clone());
        let mut tick = tokio::time::interval(PAUSE);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let consumer = self.consumer.clone();
        loop {
            tokio::select! {
                received = consumer.recv() => match received {
                    Ok(message) => self.observe(&message),
                    Err(KafkaError::PartitionEOF(partition)) => {
                        self.catching_up.remove(&partition);
                    }
                    Err(error) if error.rdkafka_error_code().is_some_and(is_unknown_topic) => {
                        return Err(error).context("the topic is gone");
                    }
                    Err(error) => {
                        tracing::warn!(%error, "Kafka cannot be read at the moment");
                        tokio::time::sleep(PAUSE).await;
                    }
                },
                _ = tick.tick() => {
                    let ends = ends.borrow().clone();
                    if ends.keys().any(|partition| !self.positions.contains_key(partition)) {
                        tracing::info!("the topic has more partitions");
                        return Ok(());
                    }
                    self.tick(&ends).await;
                }
            }
        }
    }

    fn observe(&mut self, message: &BorrowedMessage<'_>) {
        let (partition, offset) = (message.partition(), message.offset());
        let keys = self.keys.map(SharedKeys::get);
        let event = cloudevents::decode(message, keys.as_ref())
            .inspect_err(|error| tracing::warn!(partition, offset, %error, "a record is no event and is skipped"))
            .ok();
        let now = jiff::Timestamp::now();
        let arrived = event.as_ref().map_or(now, |event| cloudevents::arrival(message.timestamp(), event, now));
        let observed = self.window.observe(partition, offset, arrived, event.as_ref());
        metrics::counter!("athanor_monitor_events_total", "type" => observed.name()).increment(1);
        self.positions.insert(partition, offset + 1);
        self.uncommitted = true;
        if self.catching_up.get(&partition).is_some_and(|end| offset + 1 >= *end) {
            self.catching_up.remove(&partition);
        }
    }

    /// Once a second: gauges, and the status if it has changed. An API server that is away is asked again the next second.
    async fn tick(&mut self, ends: &Ends) {
        let lag: i64 =
            ends.iter().filter_map(|(partition, (_, end))| Some((end - self.positions.get(partition)?).max(0))).sum();
        metrics::gauge!("athanor_monitor_lag_events").set(lag as f64);
        if !self.catching_up.is_empty() {
            return;
        }
        if !std::mem::replace(&mut self.is_resumed, true) {
            self.window.resume(&self.published);
        }
        if self.window.has_only_mistakes() && !std::mem::replace(&mut self.has_warned, true) {
            tracing::warn!(
                "no label confirms an answer: if feedback reports mistakes only, it is no sample of the answers, and the verdict \
                 on accuracy does not hold (docs/events.md)"
            );
        }
        let mut status = MonitorStatus { topic: self.config.events.topic.clone(), ..self.window.status() };
        // What Kafka's retention has deleted cannot be trained on.
        for range in &mut status.ranges {
            if let Some((first, _)) = ends.get(&range.partition) {
                range.begin = range.begin.max(*first).min(range.end);
            }
        }
        set_gauges(&status, self.window.window_predictions());
        let same_verdict = status.revision == self.published.revision && status.verdict == self.published.verdict;
        status.time = match (&self.published.time, same_verdict) {
            (Some(time), true) => Some(time.clone()),
            _ => Some(jiff::Timestamp::now().to_string()),
        };
        // Counts change with every request, and each write wakes the operator: only a verdict is urgent.
        let is_due = !same_verdict || self.published_at.is_none_or(|at| at.elapsed() >= BETWEEN_COUNTS);
        if is_due && !same_text(&status, &self.published) {
            if let Err(error) = self.publisher.publish(&status).await {
                tracing::warn!(error = format!("{error:#}"), "the verdict is kept until it can be published");
                return;
            }
            if !same_verdict {
                tracing::info!(revision = status.revision, verdict = ?status.verdict, "verdict");
            }
            self.published = status;
            self.published_at = Some(Instant::now());
        } else if !is_due {
            return;
        }
        // The bookmark never runs ahead of what was published: a partition that is in no published range begins at its bookmark.
        if self.uncommitted {
            self.commit();
        }
    }

    fn commit(&mut self) {
        let mut offsets = TopicPartitionList::new();
        let topic = &self.config.events.topic;
        let added = self.positions.iter().try_for_each(|(partition, position)| {
            offsets.add_partition_offset(topic, *partition, Offset::Offset(*position))
        });
        match added.and_then(|()| self.consumer.commit(&offsets, CommitMode::Async)) {
            Ok(()) => self.uncommitted = false,
            Err(error) => tracing::debug!(%error, "the bookmark is set later"),
        }
    }
}

/// Decimals are published with four places, so that what was read back is compared as text.
fn same_text(left: &MonitorStatus, right: &MonitorStatus) -> bool {
    match (serde_json::to_value(left), serde_json::to_value(right)) {
        (Ok(left), Ok(right)) => left == right,
        _ => false,
    }
}

fn set_gauges(status: &MonitorStatus, window_predictions: usize) {
    for (name, gauge) in [
        (PREDICTION_PSI, metrics::gauge!("athanor_monitor_prediction_psi")),
        (CONFIDENCE_KS, metrics::gauge!("athanor_monitor_confidence_p_value")),
        (LABELLED_ACCURACY, metrics::gauge!("athanor_monitor_labelled_accuracy")),
        (POSITIVE_RATINGS, metrics::gauge!("athanor_monitor_positive_ratings_ratio")),
    ] {
        // NaN while there is no such statistic: 0 would look like a bad value.
        let statistic = status.statistics.iter().find(|statistic| statistic.name == name);
        gauge.set(statistic.map_or(f64::NAN, |statistic| statistic.value.get()));
    }
    metrics::gauge!("athanor_monitor_drifted").set(f64::from(u8::from(status.verdict == Verdict::Drifted)));
    metrics::gauge!("athanor_monitor_window_predictions").set(window_predictions as f64);
}

pub fn describe_metrics() {
    metrics::describe_counter!("athanor_monitor_events_total", "Records read from the deployment's topic, by type");
    metrics::describe_gauge!("athanor_monitor_prediction_psi", "Population stability index of predicted labels");
    metrics::describe_gauge!("athanor_monitor_confidence_p_value", "p-value of the test on confidences");
    metrics::describe_gauge!(
        "athanor_monitor_labelled_accuracy",
        "Share of right answers among the newest labelled or corrected ones"
    );
    metrics::describe_gauge!("athanor_monitor_positive_ratings_ratio", "Share of positive ratings among the newest");
    metrics::describe_gauge!("athanor_monitor_drifted", "1 while the verdict is Drifted");
    metrics::describe_gauge!("athanor_monitor_lag_events", "Events in Kafka that were not read yet");
    metrics::describe_gauge!("athanor_monitor_window_predictions", "Predictions in the window");
}

/// The baseline in the revision's artifact; `None` for a model that has none, such as one not trained here.
async fn read_reference(revision: &MonitoredRevision) -> anyhow::Result<Option<Reference>> {
    let uri = &revision.model_uri;
    let bytes = match athanor_store::open(uri)?.child(REFERENCE).read().await {
        Ok(bytes) => bytes,
        Err(StoreError::NotFound { .. }) => {
            tracing::warn!(uri, "the model has no {REFERENCE}: events are counted, drift is not judged");
            return Ok(None);
        }
        Err(error) => return Err(error).with_context(|| format!("{REFERENCE} of {uri} cannot be read")),
    };
    match serde_json::from_slice::<Reference>(&bytes) {
        Ok(Reference::Classes(reference)) if reference.labels.len() != reference.predicted.len() => {
            bail!("{REFERENCE} of {uri}: labels and predicted differ in length")
        }
        Ok(reference) => Ok(Some(reference)),
        Err(error) => bail!("{REFERENCE} of {uri} is not valid: {error}"),
    }
}

fn partitions(consumer: &StreamConsumer<LogContext>, topic: &str) -> anyhow::Result<Vec<i32>> {
    let metadata = consumer.fetch_metadata(Some(topic), ASK_TIMEOUT).context("no answer")?;
    let found = metadata.topics().iter().find(|found| found.name() == topic && found.error().is_none());
    let partitions: Vec<i32> =
        found.map(|topic| topic.partitions().iter().map(|it| it.id()).collect()).unwrap_or_default();
    if partitions.is_empty() {
        bail!("the topic does not exist yet");
    }
    Ok(partitions)
}

/// Follows the first and the next offset of all partitions; while Kafka is away the last known ones stay.
fn watch_ends(consumer: KafkaConsumer, topic: String) -> (watch::Receiver<Ends>, AbortOnDropHandle<()>) {
    let (sender, receiver) = watch::channel(Ends::new());
    let task = tokio::spawn(async move {
        loop {
            let (consumer, topic) = (consumer.clone(), topic.clone());
            let ends = blocking(move || {
                let ends = |partition| -> anyhow::Result<(i32, (i64, i64))> {
                    Ok((partition, consumer.fetch_watermarks(&topic, partition, ASK_TIMEOUT)?))
                };
                partitions(&consumer, &topic)?.into_iter().map(ends).collect::<anyhow::Result<Ends>>()
            });
            if let Ok(ends) = ends.await {
                sender.send_replace(ends);
            }
            tokio::time::sleep(LAG_PERIOD).await;
        }
    });
    (receiver, AbortOnDropHandle::new(task))
}

/// librdkafka's questions block the thread that asks.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> anyhow::Result<T> + Send + 'static) -> anyhow::Result<T> {
    tokio::task::spawn_blocking(work).await.context("a blocking task ended")?
}
