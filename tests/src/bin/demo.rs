//! The whole loop on the local cluster: train, serve, drift, retrain, canary, better. `make demo` runs it after it has started the
//! cluster and installed the chart. Ends with a table of what was measured, and with an error if any step did not happen.

use std::{
    collections::BTreeSet,
    sync::atomic::Ordering,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, bail, ensure};
use athanor_contract::{event, serve::Verdict};
use athanor_crds::{FineTuneJob, ModelDeployment, ModelDeploymentStatus};
use athanor_tests::{
    cluster::{self, Cluster, condition, wait},
    events, otlp, paths, prometheus,
    sentiment::{self, AWAY, HOME, Part, Text},
    storage,
    traffic::Client,
};
use indicatif::{ProgressBar, ProgressStyle};

const NAMESPACE: &str = "demo";
const NAME: &str = "sentiment";
const TOPIC: &str = "athanor.demo.sentiment";
/// Every so many texts one goes without feedback: the share of labelled requests is (N - 1) / N.
const UNLABELLED_EVERY: usize = 8;
const CONCURRENCY: usize = 24;

#[tokio::main]
async fn main() -> Result<()> {
    let receiver =
        otlp::Receiver::start("198.51.100.1:4317".parse()?).await.context("the OTLP receiver on 198.51.100.1:4317")?;
    let mut demo = Demo {
        cluster: Cluster::connect().await?,
        spans: receiver.0,
        stages: Vec::new(),
        began: Instant::now(),
        started: SystemTime::now(),
    };
    demo.run().await
}

struct Demo {
    cluster: Cluster,
    spans: otlp::Receiver,
    /// What was done, and the seconds it took.
    stages: Vec<(&'static str, f64)>,
    began: Instant,
    started: SystemTime,
}

/// Accuracy by domain, in the order of `HOME` and `AWAY`.
type Marks = Vec<(&'static str, usize, f64)>;

impl Demo {
    async fn run(&mut self) -> Result<()> {
        let cluster = self.cluster.clone();
        let started = self.stage("upload model and data to S3");
        upload(&cluster).await?;
        self.done(started, "uploaded s3://athanor/models/minilm-l6 and s3://athanor/data/{amazon,movies}.csv");

        let started = self.stage("train on Amazon and movies (two pods, kubectl -n demo get ftj)");
        let manifest = std::fs::read_to_string(paths::checkout().join("examples/sentiment.yaml"))?;
        cluster.apply(NAMESPACE, &manifest).await?;
        let job = self.train(NAME).await?;
        let summary =
            job.status.as_ref().and_then(|status| status.summary.clone()).context("the job has no summary")?;
        self.done(
            started,
            &format!("trained: accuracy {} on {} test rows", summary.metrics["accuracy"], summary.rows.test),
        );
        print_timeline(&job);

        let started = self.stage("roll out");
        let champion = self.ready().await?;
        let address = cluster.service(NAMESPACE, NAME).await?;
        let client = Client::new(address.clone())?;
        wait("the router answers", Duration::from_secs(60), async || {
            Ok(client.classify("A fine first request.", None).await.is_ok().then_some(()))
        })
        .await?;
        let warm_up = client.counts.requests.swap(0, Ordering::Relaxed);
        client.counts.failures.store(0, Ordering::Relaxed);
        self.done(started, &format!("{champion} answers at {address} (after {warm_up} tries)"));

        let started = self.stage("measure the champion on texts it never saw");
        let before = self.exam(&champion).await?;
        self.done(started, &describe(&before));

        let started = self.stage("replay Amazon and movies, with feedback");
        self.replay(&client, &sentiment::texts(&HOME, Part::Traffic)?).await?;
        let verdict =
            self.verdict(|status| status.monitor.as_ref().is_some_and(|monitor| monitor.verdict == Verdict::Stable));
        let status = verdict.await.context("the monitor calls the home traffic stable")?;
        self.done(started, &statistics(&status));

        let started = self.stage("the traffic turns to tweets and NYT");
        let away = sentiment::texts(&AWAY, Part::Traffic)?;
        self.replay(&client, &away).await?;
        let drifted = self.verdict(|status| {
            condition(&status.conditions, "Drifted").is_some_and(|condition| condition.status == "True")
        });
        let status = drifted.await.context("the monitor sees the drift")?;
        self.done(started, &statistics(&status));

        // From here on somebody always asks: none of these requests may fail.
        let background = client.background(away, 10);
        let started = self.stage("retrain on the original data and exactly the recorded events");
        let status = self.verdict(|status| status.retraining.is_some()).await.context("a retraining starts")?;
        let retraining = status.retraining.context("retraining")?;
        let job = self.train(&retraining.job).await?;
        let challenger_summary = job.status.as_ref().and_then(|status| status.summary.clone()).context("no summary")?;
        check_ranges(&job, &retraining.ranges)?;
        let chosen = |key: &str| challenger_summary.metrics.get(key).map_or("-".to_owned(), ToString::to_string);
        self.done(
            started,
            &format!(
                "{}: on the feedback's test rows {} (champion {}), the gates hold",
                retraining.job,
                chosen("feedback/accuracy"),
                chosen("baseline/feedback/accuracy")
            ),
        );

        let started = self.stage("canary: 10, 50, 100 %");
        let (challenger, weights) = self.canary(&champion).await?;
        self.done(started, &format!("{challenger} took over, weights seen: {weights:?}"));
        ensure!(weights.contains(&10) && weights.contains(&50), "the canary skipped a step: weights {weights:?}");

        let started = self.stage("measure the challenger on the same texts");
        let after = self.exam(&challenger).await?;
        self.done(started, &describe(&after));
        background.finish().await;

        let started = self.stage("audit: events, traces, dashboards");
        let audit = self.audit(&client).await?;
        self.done(started, &audit);

        self.table(&before, &after, &client)
    }

    fn stage(&mut self, name: &'static str) -> (&'static str, Instant) {
        println!("[{:>6.1} s] {name} ...", self.began.elapsed().as_secs_f64());
        (name, Instant::now())
    }

    fn done(&mut self, (name, started): (&'static str, Instant), result: &str) {
        let seconds = started.elapsed().as_secs_f64();
        println!("[{:>6.1} s]   {result} ({seconds:.1} s)", self.began.elapsed().as_secs_f64());
        self.stages.push((name, seconds));
    }

    /// Follows a job with a progress bar until it succeeded.
    async fn train(&self, name: &str) -> Result<FineTuneJob> {
        let bar = ProgressBar::new(100).with_style(ProgressStyle::with_template("  {bar:40} {pos:>3} %  {msg}")?);
        let printed = std::cell::Cell::new(0);
        let job = cluster::job_succeeded(&self.cluster, NAMESPACE, name, Duration::from_secs(1200), |job| {
            let Some(progress) = job.status.as_ref().and_then(|status| status.progress.as_ref()) else { return };
            let loss = progress.loss.map_or("-".to_owned(), |loss| loss.to_string());
            let message = format!(
                "{} step {}/{} loss {loss} ETA {}",
                progress.stage,
                progress.step,
                progress.total_steps,
                progress.eta.as_deref().unwrap_or("-")
            );
            bar.set_position(progress.percent.into());
            bar.set_message(message.clone());
            // Where nobody sees the bar, a line every tenth of the way.
            if bar.is_hidden() && progress.percent / 10 > printed.get() {
                printed.set(progress.percent / 10);
                println!("[{:>6.1} s]   {:>3} % {message}", self.began.elapsed().as_secs_f64(), progress.percent);
            }
        })
        .await;
        bar.finish_and_clear();
        let job = job?;
        let summary =
            job.status.as_ref().and_then(|status| status.summary.as_ref()).context("the job has no summary")?;
        println!("             report: {}", save_report(&summary.artifact, name).await?);
        Ok(job)
    }

    async fn status(&self) -> Result<ModelDeploymentStatus> {
        let deployment: ModelDeployment = self.cluster.deployments(NAMESPACE).get(NAME).await?;
        Ok(deployment.status.unwrap_or_default())
    }

    /// The name of the current revision once the deployment is Ready.
    async fn ready(&self) -> Result<String> {
        wait("ModelDeployment sentiment is Ready", Duration::from_secs(180), async || {
            let status = self.status().await?;
            let ready = condition(&status.conditions, "Ready").is_some_and(|condition| condition.status == "True");
            Ok(status.current_revision.filter(|_| ready).map(|revision| revision.name))
        })
        .await
    }

    async fn verdict(&self, wanted: impl Fn(&ModelDeploymentStatus) -> bool) -> Result<ModelDeploymentStatus> {
        let found = wait("the status says so", Duration::from_secs(120), async || {
            let status = self.status().await?;
            Ok(wanted(&status).then_some(status))
        });
        match found.await {
            Ok(status) => Ok(status),
            Err(error) => Err(error).with_context(|| "see kubectl -n demo get mdep sentiment -o yaml".to_owned()),
        }
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
            self.began.elapsed().as_secs_f64(),
            texts.len(),
            accuracy?
        );
        Ok(())
    }

    /// Asks the revision's own Service, past the router: an exam is not traffic and leaves no events.
    async fn exam(&self, revision: &str) -> Result<Marks> {
        let address = format!("{}:8080", self.cluster.service(NAMESPACE, revision).await?);
        let client = Client::new(address)?;
        let mut marks = Vec::new();
        for domain in HOME.into_iter().chain(AWAY) {
            let texts = sentiment::texts(&[domain], Part::Exam)?;
            marks.push((domain, texts.len(), client.exam(&texts, revision).await?));
        }
        Ok(marks)
    }

    /// Waits until another revision has all traffic; returns it and the weights it had on the way.
    async fn canary(&self, champion: &str) -> Result<(String, Vec<u32>)> {
        let seen = std::cell::RefCell::new(BTreeSet::new());
        let challenger = wait("the challenger takes over", Duration::from_secs(240), async || {
            let status = self.status().await?;
            if let Some(candidate) = &status.candidate {
                seen.borrow_mut().insert(candidate.weight);
            }
            ensure!(status.failed_revisions.is_empty(), "rolled back: {:?}", status.failed_revisions);
            Ok(status.current_revision.map(|revision| revision.name).filter(|name| name != champion))
        })
        .await?;
        Ok((challenger, seen.into_inner().into_iter().collect()))
    }

    /// Follows the events of this run to their ends, and one request through the processes.
    async fn audit(&self, client: &Client) -> Result<String> {
        let traced = client.classify("A request that is followed through the processes.", None).await?;
        let sent =
            client.counts.feedback.load(Ordering::Relaxed) - client.counts.feedback_failures.load(Ordering::Relaxed);
        let (records, trace_id) = wait("every event is in Kafka", Duration::from_secs(30), async || {
            let records = tokio::task::spawn_blocking(|| events::read_all(TOPIC)).await??;
            let feedback: BTreeSet<&str> = records
                .iter()
                .filter(|record| record.kind == event::FEEDBACK)
                .map(|record| record.id.as_str())
                .collect();
            let arrived = feedback.len() as u64 >= sent;
            let trace = records
                .iter()
                .find(|record| record.request_id == traced.request_id)
                .and_then(|record| record.trace_parent.as_deref()?.split('-').nth(1).map(str::to_owned));
            Ok(trace.filter(|_| arrived).map(|trace| (records, trace)))
        })
        .await?;
        let services = wait("the trace has router and server", Duration::from_secs(30), async || {
            let services: BTreeSet<String> = self.spans.trace(&trace_id).into_iter().map(|span| span.service).collect();
            let whole = services.contains("athanor-router") && services.contains("athanor-server");
            Ok(whole.then_some(services))
        })
        .await
        .with_context(|| format!("trace {trace_id}: {:?}", self.spans.trace(&trace_id)))?;

        let http = reqwest::Client::builder().no_proxy().build()?;
        let queries = prometheus::dashboard_queries(&paths::checkout().join("helm/athanor/files/dashboards"))?;
        let mut empty = Vec::new();
        for (panel, query) in &queries {
            if prometheus::samples(&http, query, self.started).await? == 0 {
                empty.push(format!("{panel}: {query}"));
            }
        }
        ensure!(empty.is_empty(), "dashboard queries without data:\n  {}", empty.join("\n  "));
        let predictions = records.iter().filter(|record| record.kind == event::PREDICTION).count();
        Ok(format!(
            "{predictions} predictions and {sent} feedback events in Kafka; trace {trace_id} through {}; {} dashboard queries have data",
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
        println!("\nSeconds of each stage");
        for (name, seconds) in &self.stages {
            println!("  {seconds:>7.1}  {name}");
        }
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

/// Copies a job's report from its artifact to where a browser finds it.
async fn save_report(artifact: &str, name: &str) -> Result<String> {
    let folder = artifact.strip_prefix(&format!("s3://{}/", storage::BUCKET)).context("the artifact is elsewhere")?;
    let html = storage::get(&storage::bucket()?, &format!("{folder}/report.html")).await?;
    ensure!(html.starts_with(b"<!doctype html>"), "{artifact}/report.html is no page");
    let path = paths::cache().join("logs").join(format!("report-{name}.html"));
    std::fs::write(&path, html).with_context(|| path.display().to_string())?;
    Ok(path.display().to_string())
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

/// The retraining reads the offsets that the verdict named, and no others.
fn check_ranges(job: &FineTuneJob, wanted: &[athanor_contract::train::OffsetRange]) -> Result<()> {
    let read: Vec<_> = job
        .spec
        .train
        .data
        .sources
        .iter()
        .filter_map(|source| source.kafka.as_ref())
        .flat_map(|kafka| kafka.ranges.clone())
        .collect();
    ensure!(!read.is_empty() && read == wanted, "the retraining reads {read:?}, the verdict named {wanted:?}");
    Ok(())
}

fn print_timeline(job: &FineTuneJob) {
    let Some(status) = &job.status else { return };
    let mut timeline: Vec<_> = status.timeline.iter().collect();
    timeline.sort_by(|a, b| a.1.get().total_cmp(&b.1.get()));
    let line: Vec<String> = timeline.iter().map(|(name, seconds)| format!("{name} {seconds} s")).collect();
    println!("             since kubectl apply: {}", line.join(", "));
}

fn describe(marks: &Marks) -> String {
    marks.iter().map(|(domain, _, mark)| format!("{domain} {mark:.3}")).collect::<Vec<_>>().join(", ")
}

fn statistics(status: &ModelDeploymentStatus) -> String {
    let Some(monitor) = &status.monitor else { return "no verdict".into() };
    let values: Vec<String> = monitor
        .statistics
        .iter()
        .map(|statistic| format!("{} {} (limit {})", statistic.name, statistic.value, statistic.threshold))
        .collect();
    format!(
        "{:?} after {} predictions, {} labelled: {}",
        monitor.verdict,
        monitor.predictions,
        monitor.labelled,
        values.join(", ")
    )
}
