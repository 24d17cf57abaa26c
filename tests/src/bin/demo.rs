//! The whole loop on the local cluster: train, serve, drift, retrain, canary, better. `make demo` runs it after it has started the
//! cluster and installed the chart. Ends with a table of what was measured, and with an error if any step did not happen.

use std::{
    collections::BTreeSet,
    sync::atomic::Ordering,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, bail, ensure};
use athanor_contract::{event, monitor::Verdict};
use athanor_tests::{
    cluster::{Cluster, wait},
    events::{self, Record},
    labelled::{exactly_once, ids, recorded},
    otlp, paths, prometheus,
    sentiment::{self, AWAY, HOME, Part, Text},
    stages::{Stages, check_retraining, print_timeline, statistics},
    storage,
    traffic::Client,
    verdicts::Verdicts,
};
use indicatif::{ProgressBar, ProgressStyle};

const NAMESPACE: &str = "demo";
const NAME: &str = "sentiment";
const TOPIC: &str = "athanor.demo.sentiment";
/// `retrain.minimumSamples` of examples/sentiment.yaml.
const MINIMUM_SAMPLES: u64 = 5000;
/// Every so many texts one goes without feedback: the share of labelled requests is (N - 1) / N.
const UNLABELLED_EVERY: usize = 8;
const CONCURRENCY: usize = 24;
/// Dashboards and panels, by the beginning of their names, for what is not part of the demo: language models, ratings, API keys.
const WITHOUT_DATA: [&str; 3] =
    ["language-models / ", "feedback / Positive ratings", "serving / Denied requests per second"];

#[tokio::main]
async fn main() -> Result<()> {
    let receiver =
        otlp::Receiver::start("198.51.100.1:4317".parse()?).await.context("the OTLP receiver on 198.51.100.1:4317")?;
    let stages = Stages::new(Cluster::connect().await?, NAMESPACE, NAME);
    let mut demo = Demo { stages, spans: receiver.0, started: SystemTime::now() };
    demo.run().await
}

struct Demo {
    stages: Stages,
    spans: otlp::Receiver,
    started: SystemTime,
}

/// Accuracy by domain, in the order of `HOME` and `AWAY`.
type Marks = Vec<(&'static str, usize, f64)>;

impl Demo {
    async fn run(&mut self) -> Result<()> {
        let cluster = self.stages.cluster.clone();
        let started = self.stages.begin("upload model and data to S3");
        upload(&cluster).await?;
        self.stages.end(started, "uploaded s3://athanor/models/minilm-l6 and s3://athanor/data/{amazon,movies}.csv");

        let started = self.stages.begin("train on Amazon and movies (two pods, kubectl -n demo get ftj)");
        let manifest = std::fs::read_to_string(paths::checkout().join("examples/sentiment.yaml"))?;
        cluster.apply(NAMESPACE, &manifest).await?;
        let job = self.stages.train(NAME).await?;
        let summary =
            job.status.as_ref().and_then(|status| status.summary.clone()).context("the job has no summary")?;
        self.stages.end(
            started,
            &format!("trained: accuracy {} on {} test rows", summary.metrics["accuracy"], summary.rows.test),
        );
        print_timeline(&job);

        let started = self.stages.begin("roll out");
        let champion = self.stages.ready(NAME).await?;
        let address = cluster.service(NAMESPACE, NAME).await?;
        let client = Client::new(address.clone())?;
        wait("the router answers", Duration::from_secs(60), async || {
            Ok(client.classify("A fine first request.", None).await.is_ok().then_some(()))
        })
        .await?;
        let verdicts = Verdicts::watch(&cluster, NAMESPACE, NAME);
        let warm_up = client.counts.requests.swap(0, Ordering::Relaxed);
        client.counts.failures.store(0, Ordering::Relaxed);
        self.stages.end(started, &format!("{champion} answers at {address} (after {warm_up} tries)"));

        let started = self.stages.begin("measure the champion on texts it never saw");
        let before = self.exam(&champion).await?;
        self.stages.end(started, &describe(&before));

        let started = self.stages.begin("replay Amazon and movies, with feedback");
        self.replay(&client, &sentiment::texts(&HOME, Part::Traffic)?).await?;
        let verdict = self
            .stages
            .wait_status(|status| status.monitor.as_ref().is_some_and(|monitor| monitor.verdict == Verdict::Stable));
        let status = verdict.await.context("the monitor calls the home traffic stable")?;
        self.stages.end(started, &statistics(&status));

        let started = self.stages.begin("the traffic turns to tweets and NYT");
        let away = sentiment::texts(&AWAY, Part::Traffic)?;
        self.replay(&client, &away).await?;
        let status = self.stages.drifted().await?;
        self.stages.end(started, &statistics(&status));

        // From here on somebody always asks: none of these requests may fail.
        let background = client.background(away, 10);
        let started = self.stages.begin("retrain on the original data and exactly the recorded events");
        let status =
            self.stages.wait_status(|status| status.retraining.is_some()).await.context("a retraining starts")?;
        let retraining = status.retraining.context("retraining")?;
        let job = self.stages.train(&retraining.job).await?;
        let challenger_summary = job.status.as_ref().and_then(|status| status.summary.clone()).context("no summary")?;
        let chosen = |key: &str| challenger_summary.metrics.get(key).map_or("-".to_owned(), ToString::to_string);
        self.stages.end(
            started,
            &format!(
                "{}: on the feedback's test rows {} (champion {}), the gates hold",
                retraining.job,
                chosen("feedback/accuracy"),
                chosen("baseline/feedback/accuracy")
            ),
        );

        let started = self.stages.begin("canary: 10, 50, 100 %");
        let (challenger, weights) = self.stages.canary(&champion, Duration::from_secs(240)).await?;
        self.stages.end(started, &format!("{challenger} took over, weights seen: {weights:?}"));
        ensure!(weights.contains(&10) && weights.contains(&50), "the canary skipped a step: weights {weights:?}");

        check_retraining(&job, &verdicts, MINIMUM_SAMPLES, TOPIC).await?;

        let started = self.stages.begin("measure the challenger on the same texts");
        let after = self.exam(&challenger).await?;
        self.stages.end(started, &describe(&after));
        background.finish().await;

        let started = self.stages.begin("audit: events, traces, dashboards");
        let audit = self.audit(&client).await?;
        self.stages.end(started, &audit);

        self.table(&before, &after, &client)
    }

    async fn replay(&self, client: &Client, texts: &[Text]) -> Result<()> {
        let bar = ProgressBar::new(texts.len() as u64)
            .with_style(ProgressStyle::with_template("  {bar:40} {pos}/{len} requests, {per_sec}, {eta} left")?);
        let began = Instant::now();
        let accuracy = client.replay(texts, CONCURRENCY, |index| index % UNLABELLED_EVERY != 0, || bar.inc(1)).await;
        bar.finish_and_clear();
        let rate = texts.len() as f64 / began.elapsed().as_secs_f64();
        println!(
            "[{:>6.1} s]   {} requests, {rate:.0} a second, {:.3} right",
            self.stages.seconds(),
            texts.len(),
            accuracy?
        );
        Ok(())
    }

    /// Asks the revision's own Service, past the router: an exam is not traffic and leaves no events.
    async fn exam(&self, revision: &str) -> Result<Marks> {
        let address = format!("{}:8080", self.stages.cluster.service(NAMESPACE, revision).await?);
        let client = Client::new(address)?;
        let mut marks = Vec::new();
        for domain in HOME.into_iter().chain(AWAY) {
            let texts = sentiment::texts(&[domain], Part::Exam)?;
            marks.push((domain, texts.len(), client.exam(&texts, revision).await?));
        }
        Ok(marks)
    }

    /// Follows the events of this run to their ends, and one request through the processes.
    async fn audit(&self, client: &Client) -> Result<String> {
        let traced = client.classify("A request that is followed through the processes.", None).await?;
        let (answered, accepted) = (client.counts.answered.all(), client.counts.accepted.all());
        let records = recorded(TOPIC, event::PREDICTION, &answered, &accepted).await?;
        recorded_once(&records, "answers", event::PREDICTION, &answered)?;
        recorded_once(&records, "feedback", event::FEEDBACK, &accepted)?;
        let trace_id = records
            .iter()
            .find(|record| record.request_id == traced.request_id)
            .and_then(|record| record.trace_parent.as_deref()?.split('-').nth(1).map(str::to_owned))
            .context("the event of the followed request has no trace")?;
        let services = wait("the trace has router and server", Duration::from_secs(30), async || {
            let services: BTreeSet<String> = self.spans.trace(&trace_id).into_iter().map(|span| span.service).collect();
            let whole = services.contains("athanor-router") && services.contains("athanor-server");
            Ok(whole.then_some(services))
        })
        .await
        .with_context(|| format!("trace {trace_id}: {:?}", self.spans.trace(&trace_id)))?;

        let http = reqwest::Client::builder().no_proxy().build()?;
        let mut queries = prometheus::dashboard_queries(&paths::checkout().join("helm/athanor/files/dashboards"))?;
        queries.retain(|(panel, _)| !WITHOUT_DATA.iter().any(|absent| panel.starts_with(*absent)));
        let mut empty = Vec::new();
        for (panel, query) in &queries {
            if prometheus::samples(&http, query, self.started).await? == 0 {
                empty.push(format!("{panel}: {query}"));
            }
        }
        ensure!(empty.is_empty(), "dashboard queries without data:\n  {}", empty.join("\n  "));
        Ok(format!(
            "{} predictions and {} feedback events in Kafka, each once; trace {trace_id} through {}; {} dashboard queries have data",
            answered.len(),
            accepted.len(),
            services.into_iter().collect::<Vec<_>>().join(", "),
            queries.len()
        ))
    }

    fn table(&self, before: &Marks, after: &Marks, client: &Client) -> Result<()> {
        println!("\nAccuracy on texts that were never trained on      before    after     gain");
        for ((domain, texts, old), (_, _, new)) in before.iter().zip(after) {
            println!(
                "  {domain:<10} {texts:>5} texts                          {old:.3}     {new:.3}   {:+.3}",
                new - old
            );
        }
        let mean = |marks: &Marks, domains: &[&str]| {
            let picked = marks.iter().filter(|(domain, ..)| domains.contains(domain));
            let (right, all) = picked
                .fold((0.0, 0.0), |(right, all), (_, texts, mark)| (right + mark * *texts as f64, all + *texts as f64));
            right / all
        };
        let away = mean(after, &AWAY) - mean(before, &AWAY);
        let home = mean(after, &HOME) - mean(before, &HOME);
        println!("  tweets + NYT {away:+.3}, Amazon + movies {home:+.3}");
        self.stages.print_seconds();
        let counts = &client.counts;
        let count = |count: &std::sync::atomic::AtomicU64| count.load(Ordering::Relaxed);
        println!(
            "\nRequests {}, failed {}. Feedback {}, refused {}. Spans received {}.",
            count(&counts.requests),
            count(&counts.failures),
            count(&counts.feedback),
            count(&counts.feedback_failures),
            self.spans.spans()
        );
        println!(
            "\nTry next:\n  export KUBECONFIG=$(make -s kubeconfig)\n  kubectl -n demo get athanor\n  kubectl -n demo describe mdep sentiment\n  \
             kubectl explain ftj.spec.hyperparameters\n  curl -s http://$(kubectl -n demo get service sentiment -o jsonpath={{.spec.clusterIP}})/v1/classify -H 'content-type: application/json' -d '{{\"input\": \"What a day!\"}}'\n  \
             make demo-down"
        );
        if count(&counts.failures) + count(&counts.feedback_failures) > 0 {
            bail!("{} requests failed", count(&counts.failures) + count(&counts.feedback_failures));
        }
        ensure!(away > 0.0, "the retrained model did not gain on tweets and NYT: {away:+.3}");
        ensure!(home > -0.02, "the retrained model lost on Amazon and movies: {home:+.3}");
        Ok(())
    }
}

async fn upload(cluster: &Cluster) -> Result<()> {
    cluster.namespace(NAMESPACE).await?;
    events::delete_topic(TOPIC).await?;
    storage::create_bucket()?;
    let bucket = storage::bucket()?;
    storage::put_folder(&bucket, &paths::models().join("minilm-l6"), "models/minilm-l6").await?;
    for domain in HOME {
        let rows = sentiment::csv(&sentiment::texts(&[domain], Part::Training)?);
        storage::put(&bucket, &format!("data/{domain}.csv"), rows.into_bytes()).await?;
    }
    Ok(())
}

/// Each request of the client has one event of this kind, and nobody else has any.
fn recorded_once(records: &[Record], what: &str, kind: &str, known: &[String]) -> Result<()> {
    let others = exactly_once(what, known, ids(records, kind))?;
    ensure!(others == 0, "{what}: {others} events are of requests that nobody made");
    Ok(())
}

fn describe(marks: &Marks) -> String {
    marks.iter().map(|(domain, _, mark)| format!("{domain} {mark:.3}")).collect::<Vec<_>>().join(", ")
}
