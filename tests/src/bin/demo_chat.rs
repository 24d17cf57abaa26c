//! The loop for a language model on the local cluster: fine-tune SmolLM2 with LoRA, serve it, stream from it, correct its
//! answers, retrain on exactly those corrections, and promote the new model while streams run. `make demo-chat` runs it after
//! it has started the cluster and installed the chart. Ends with a table of what was measured, and with an error if any step
//! did not happen.

use std::{
    process::Command,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use athanor_contract::{event, train::TrainSummary};
use athanor_tests::{
    chat::{Client, Marks},
    cluster::{Cluster, wait},
    events,
    finance::{self, Domain, Part, Sentence},
    labelled::{exactly_once, ids, recorded},
    paths,
    stages::{Stages, check_retraining, print_timeline, statistics},
    storage,
    verdicts::Verdicts,
};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use tokio_util::sync::CancellationToken;

const NAMESPACE: &str = "demo-chat";
/// The ModelDeployment and the FineTuneJob of the chat model.
const NAME: &str = "finance";
/// Those of the embedding model, which the LangChain program searches with.
const EMBEDDING: &str = "finance-embedding";
/// Key of the application, whose hash the deployment has.
const KEY: &str = "sk-demo-chat";
const TOPIC: &str = "athanor.demo-chat.finance";
/// `retrain.minimumSamples` of examples/finance.yaml.
const MINIMUM_SAMPLES: u64 = 90;
/// Rows of the first training.
const HOME_ROWS: usize = 120;
/// Requests at the same time.
const CONCURRENCY: usize = 4;
/// Streams that run during the roll-out.
const STREAMS: usize = 2;

/// Runs the loop for a language model on the local cluster, which `make demo-chat` starts.
#[derive(Parser)]
struct Arguments {
    /// Python with the packages of examples/langchain/requirements.txt. Absent: the LangChain program is not run.
    #[arg(long)]
    python: Option<std::path::PathBuf>,
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let stages = Stages::new(Cluster::connect().await?, NAMESPACE, NAME);
    Demo { stages, arguments }.run().await
}

struct Demo {
    stages: Stages,
    arguments: Arguments,
}

/// The marks of one revision by domain: home, away.
type Exam = [Marks; 2];

impl Demo {
    async fn run(&mut self) -> Result<()> {
        let started = self.stages.begin("upload models and data to S3");
        upload(&self.stages.cluster).await?;
        self.stages.end(started, "uploaded s3://athanor/models/{smollm2-135m,minilm-l6} and s3://athanor/data/*.jsonl");

        let started = self.stages.begin("fine-tune SmolLM2-135M with LoRA (two pods, kubectl -n demo-chat get ftj)");
        self.secrets().await?;
        let manifest = std::fs::read_to_string(paths::checkout().join("examples/finance.yaml"))?;
        self.stages.cluster.apply(NAMESPACE, &manifest).await?;
        let job = self.stages.train(NAME).await?;
        let first = job.status.as_ref().and_then(|status| status.summary.clone()).context("the job has no summary")?;
        let (f1, base) = (metric(&first, "tokenF1")?, metric(&first, "baseline/tokenF1")?);
        self.stages.end(started, &format!("TokenF1 {base:.3} -> {f1:.3} on {} test rows", first.rows.test));
        print_timeline(&job);

        let started = self.stages.begin("train the embedding model");
        self.stages.train(EMBEDDING).await?;
        self.stages.end(started, "trained on consecutive sentences");

        let started = self.stages.begin("roll out both models");
        let champion = self.stages.ready(NAME).await?;
        let searching = self.stages.ready(EMBEDDING).await?;
        let address = self.stages.cluster.service(NAMESPACE, NAME).await?;
        let away = finance::sentences(Domain::Away, Part::Rest, 120)?;
        let probe = Client::new(address.clone(), NAME)?.with_key(KEY);
        wait("the router answers", Duration::from_secs(60), async || {
            Ok(probe.ask(&away[0], None).await.is_ok().then_some(()))
        })
        .await?;
        let stranger = Client::new(address.clone(), NAME)?.ask(&away[0], None).await;
        let refused = stranger.err().context("a request without a key was answered")?.to_string();
        ensure!(refused.starts_with("401"), "a request without a key was refused otherwise: {refused}");
        let client = Client::new(address.clone(), NAME)?.with_key(KEY);
        self.stages.end(started, &format!("{champion} and {searching} answer; a request without a key got 401"));

        self.langchain(&address).await?;

        let started = self.stages.begin("measure the first model on sentences that no training uses");
        let before = self.exam(&champion).await?;
        self.stages.end(started, &describe(&before));

        let verdicts = Verdicts::watch(&self.stages.cluster, NAMESPACE, NAME);
        let started = self.stages.begin("the traffic turns to organizations and places, with corrections");
        let bar = ProgressBar::new(away.len() as u64)
            .with_style(ProgressStyle::with_template("  {bar:40} {pos}/{len} answers, {eta} left")?);
        let (marks, rate) = client.replay(&away, CONCURRENCY, || bar.inc(1)).await?;
        bar.finish_and_clear();
        let status = self.stages.drifted().await?;
        let found = statistics(&status);
        self.stages.end(
            started,
            &format!("{} answers, TokenF1 {:.3}, {rate:.0} tokens/s; {found}", marks.sentences, marks.token_f1),
        );

        let started = self.stages.begin("retrain on the first data and exactly the recorded corrections");
        let status = self.stages.wait_status(|status| status.retraining.is_some()).await?;
        let retraining = status.retraining.context("retraining")?;
        let job = self.stages.train(&retraining.job).await?;
        let second = job.status.as_ref().and_then(|status| status.summary.clone()).context("no summary")?;
        let (f1, base) = (metric(&second, "tokenF1")?, metric(&second, "baseline/tokenF1")?);
        self.stages.end(started, &format!("{}: TokenF1 {base:.3} -> {f1:.3}, the gates hold", retraining.job));

        let started = self.stages.begin("canary: 10, 50, 100 % while streams run");
        let stop = CancellationToken::new();
        let streams = client.background(away.clone(), STREAMS, stop.clone());
        let (challenger, weights) = self.stages.canary(&champion, Duration::from_secs(300)).await?;
        // The old revision drains while they go on.
        tokio::time::sleep(Duration::from_secs(5)).await;
        stop.cancel();
        streams.join_all().await;
        ensure!(weights.contains(&10) && weights.contains(&50), "the canary skipped a step: weights {weights:?}");
        self.stages.end(started, &format!("{challenger} took over, weights seen: {weights:?}"));

        check_retraining(&job, &verdicts, MINIMUM_SAMPLES, TOPIC).await?;

        let started = self.stages.begin("measure the retrained model on the same sentences");
        let after = self.exam(&challenger).await?;
        self.stages.end(started, &describe(&after));

        let started = self.stages.begin("audit: events");
        let audit = audit(&client).await?;
        self.stages.end(started, &audit);

        self.table(&first, &before, &after, rate, &client)
    }

    /// The Secrets that the example names besides that of S3.
    async fn secrets(&self) -> Result<()> {
        let cluster = &self.stages.cluster;
        cluster.secret(NAMESPACE, "kafka-credentials", events::credentials()?).await?;
        let hash = athanor_contract::artifact::sha256_hex(KEY.as_bytes());
        cluster.secret(NAMESPACE, "finance-api-keys", serde_json::json!({"app": format!("sha256:{hash}")})).await
    }

    /// Asks the revision's own Service, past the router: an exam is not traffic and leaves no events.
    async fn exam(&self, revision: &str) -> Result<Exam> {
        let address = format!("{}:8080", self.stages.cluster.service(NAMESPACE, revision).await?);
        let client = Client::new(address, NAME)?;
        let mut exam = Exam::default();
        for (marks, domain) in std::iter::zip(&mut exam, [Domain::Home, Domain::Away]) {
            *marks = client.exam(&finance::sentences(domain, Part::Exam, 40)?, revision).await?;
        }
        Ok(exam)
    }

    /// Runs examples/langchain/answer.py against the two deployments.
    async fn langchain(&mut self, chat: &str) -> Result<()> {
        let Some(python) = self.arguments.python.clone() else { return Ok(()) };
        let started = self.stages.begin("a LangChain program searches a PDF and asks the model");
        let embedding = self.stages.cluster.service(NAMESPACE, EMBEDDING).await?;
        let mut command = Command::new(python);
        command
            .arg(paths::checkout().join("examples/langchain/answer.py"))
            .args(["--chat-url", &format!("{chat}/v1"), "--chat-model", NAME])
            .env("OPENAI_API_KEY", KEY)
            .args(["--embedding-url", &format!("{embedding}/v1"), "--embedding-model", EMBEDDING])
            .arg("Who lends the money, and to whom?")
            // libtorch's path is not for Python.
            .env_remove("LD_LIBRARY_PATH")
            .env("NO_PROXY", "*");
        let output = tokio::task::spawn_blocking(move || command.output()).await??;
        let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        ensure!(output.status.success(), "answer.py failed:\n{}", String::from_utf8_lossy(&output.stderr));
        for line in text.lines() {
            println!("             {line}");
        }
        ensure!(text.lines().any(|line| line.starts_with("Answer: ") && line.len() > 8), "answer.py gave no answer");
        self.stages.end(started, "answered");
        Ok(())
    }

    fn table(&self, first: &TrainSummary, before: &Exam, after: &Exam, rate: f64, client: &Client) -> Result<()> {
        println!("\nOn held-out sentences           sentences   TokenF1 first  retrained   exact first  retrained");
        for (name, old, new) in
            [("no one, persons", before[0], after[0]), ("organizations, places", before[1], after[1])]
        {
            println!(
                "  {name:<28} {:>10} {:>14.3} {:>10.3} {:>13.3} {:>10.3}",
                new.sentences, old.token_f1, new.token_f1, old.exact_match, new.exact_match
            );
        }
        println!(
            "On the first job's {} test rows: TokenF1 of SmolLM2 {:.3}, of the first model {:.3}; exact match {:.3}, {:.3}",
            first.rows.test,
            metric(first, "baseline/tokenF1")?,
            metric(first, "tokenF1")?,
            metric(first, "baseline/exactMatch")?,
            metric(first, "exactMatch")?
        );
        self.stages.print_seconds();
        let counts = &client.counts;
        let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
        println!(
            "\nRequests {}, streams {}, failed {}. Corrections {}, refused {}. {rate:.0} tokens/s with {CONCURRENCY} requests at a time.",
            count(&counts.requests),
            count(&counts.streams),
            count(&counts.failures),
            count(&counts.feedback),
            count(&counts.feedback_failures)
        );
        println!(
            "\nTry next:\n  export KUBECONFIG=$(make -s kubeconfig)\n  kubectl -n {NAMESPACE} get athanor\n  \
             curl -N http://$(kubectl -n {NAMESPACE} get service {NAME} -o jsonpath={{.spec.clusterIP}})/v1/chat/completions -H 'authorization: Bearer {KEY}' \
             -H 'content-type: application/json' -d '{{\"model\": \"{NAME}\", \"stream\": true, \"messages\": [{{\"role\": \"user\", \"content\": \"Bank lends to Borrower .\"}}]}}'\n  \
             make demo-down"
        );
        let failed = count(&counts.failures) + count(&counts.feedback_failures);
        ensure!(failed == 0, "{failed} requests failed");
        ensure!(count(&counts.streams) > 0, "no stream ran");
        let gain = after[1].token_f1 - before[1].token_f1;
        ensure!(gain > 0.0, "the retrained model did not gain on organizations and places: {gain:+.3}");
        Ok(())
    }
}

/// Each answer and each correction of the client is recorded once. Others asked as well: the probe and the program.
async fn audit(client: &Client) -> Result<String> {
    let (answered, accepted) = (client.counts.answered.all(), client.counts.accepted.all());
    let records = recorded(TOPIC, event::GENERATION, &answered, &accepted).await?;
    exactly_once("answers", &answered, ids(&records, event::GENERATION))?;
    let others = exactly_once("corrections", &accepted, ids(&records, event::FEEDBACK))?;
    ensure!(others == 0, "{others} corrections are of requests that nobody corrected");
    Ok(format!("{} answers and {} corrections in Kafka, each once", answered.len(), accepted.len()))
}

fn metric(summary: &TrainSummary, name: &str) -> Result<f64> {
    Ok(summary.metrics.get(name).with_context(|| format!("the summary has no {name}"))?.get())
}

fn describe(exam: &Exam) -> String {
    let [home, away] = exam;
    format!("no one, persons: TokenF1 {:.3}; organizations, places: {:.3}", home.token_f1, away.token_f1)
}

async fn upload(cluster: &Cluster) -> Result<()> {
    cluster.namespace(NAMESPACE).await?;
    events::delete_topic(TOPIC).await?;
    storage::create_bucket()?;
    let bucket = storage::bucket()?;
    for model in ["smollm2-135m", "minilm-l6"] {
        storage::put_folder(&bucket, &paths::models().join(model), &format!("models/{model}")).await?;
    }
    let home = finance::sentences(Domain::Home, Part::Rest, HOME_ROWS)?;
    storage::put(&bucket, "data/finance.jsonl", finance::json_lines(&home).into_bytes()).await?;
    let pairs: String = consecutive(&finance::all(Part::Rest)?);
    storage::put(&bucket, "data/finance-pairs.jsonl", pairs.into_bytes()).await?;
    Ok(())
}

/// Each sentence with the one after it, as JSON lines: they are about the same.
fn consecutive(sentences: &[Sentence]) -> String {
    let pairs = sentences.windows(2).map(|pair| serde_json::json!({"text": pair[0].text, "next": pair[1].text}));
    pairs.map(|pair| format!("{pair}\n")).collect()
}
