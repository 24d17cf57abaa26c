//! The command line of the trainer: configuration, process-wide set-up, and the exit code.

use std::{
    io::{IsTerminal, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use athanor_contract::{
    process::port,
    train::{DistributedSpec, TrainConfig, TrainResult, exit_code},
};
use athanor_telemetry::Readiness;
use athanor_trainer::{
    TrainError,
    distributed::{Node, Topology, environment, launch::launch},
    job::{check, config, context::Process, run, search, work::Work},
    report::{Timeline, ops, termination},
    train::watchdog::{Watchdog, Watched},
};
use clap::{Args, Parser, Subcommand};
use tokio::runtime::{Builder, Runtime};
use tokio_util::sync::CancellationToken;

/// Fine-tunes encoders and language models, on one machine or as the pods of a FineTuneJob.
#[derive(Parser)]
#[command(version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train once and write the artifact.
    ///
    /// On a laptop, give the manifest that `kubectl apply` takes. The artifact is written below spec.output.to, and
    /// running the same manifest again continues from the newest checkpoint. With spec.distributed.processesPerNode
    /// above 1 that many processes train together.
    ///
    /// Exit codes: 0 done (also if a gate failed), 3 the job or its data must be changed, 42 lost a peer, 43 no
    /// progress, 44 loss or gradient not finite, 45 asked to stop.
    Run(RunArguments),
    /// Report what a job would do, and every mistake in it, without training.
    ///
    /// Reads the manifest, the rows and the model, and prints rows, labels, token lengths, steps, memory and the
    /// expected time. Exit code 3 if there are mistakes, which are printed one per line.
    Check(CheckArguments),
}

#[derive(Args)]
struct CheckArguments {
    /// A FineTuneJob manifest, YAML or JSON.
    #[arg(short, long, value_name = "JOB.YAML")]
    file: PathBuf,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct RunArguments {
    /// A FineTuneJob manifest, YAML or JSON.
    #[arg(short, long, value_name = "JOB.YAML")]
    file: Option<PathBuf>,
    /// The configuration that athanor-operator mounts into a pod.
    #[arg(long, value_name = "TRAIN.JSON")]
    config: Option<PathBuf>,
}

/// Time for a run that was asked to stop to finish its step and its checkpoint: less than a pod's usual 30 s.
const STOP_PATIENCE: Duration = Duration::from_secs(25);

fn main() -> ExitCode {
    let timeline = run::started_now();
    athanor_data::pdf::serve_if_asked();
    let arguments = match Cli::parse().command {
        Command::Run(arguments) => arguments,
        Command::Check(arguments) => return check_only(&arguments.file),
    };
    if let Some(parent) = variable(environment::PARENT) {
        let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
        // It may have been killed before.
        if rustix::process::getppid().is_none_or(|id| id.as_raw_nonzero().to_string() != parent) {
            return ExitCode::FAILURE;
        }
    }
    let runtime = match Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("no runtime could be started: {error}");
            return ExitCode::FAILURE;
        }
    };
    let code = {
        let _inside = runtime.enter();
        let _telemetry = athanor_telemetry::init("athanor-trainer");
        match execute(&runtime, &arguments, timeline) {
            Ok(code) => code,
            Err(error) => {
                tracing::error!(code = error.exit_code(), "{error}");
                if let Some(path) = termination::path(variable)
                    && let Err(error) = termination::write_failure(&path, &error)
                {
                    tracing::error!(%error, "the termination message could not be written");
                }
                error.exit_code()
            }
        }
    };
    let _ = std::io::stdout().flush();
    // Destructors of collectives would wait for peers that may be gone.
    athanor_torch::exit_now(code)
}

fn check_only(file: &Path) -> ExitCode {
    let checked = Runtime::new().map_err(TrainError::other).and_then(|runtime| {
        let config = config::load_manifest(file)?;
        let topology =
            Topology::new(&DistributedSpec { processes_per_node: 1, ..config.spec.distributed }, |_: &str| None)?;
        run::set_up_process(&topology);
        check::check(&config, topology.device(), runtime.handle())
    });
    match checked {
        Ok(text) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(1))
        }
    }
}

fn execute(runtime: &Runtime, arguments: &RunArguments, timeline: Timeline) -> Result<i32, TrainError> {
    let (config, in_pod) = match (&arguments.file, &arguments.config) {
        (Some(file), _) => (config::load_manifest(file)?, false),
        (None, Some(file)) => (config::load(file)?, true),
        (None, None) => return Err(TrainError::User("give --file or --config".into())),
    };
    let topology = Topology::new(&config.spec.distributed, variable)?;
    let stop = athanor_telemetry::shutdown_signal();
    // In a pod the operator has run the search, and the configuration has its result.
    let config = match in_pod {
        true => config,
        false => runtime.block_on(search::best(&config, stop.clone()))?,
    };
    if topology.is_launcher(variable) {
        return start_ranks(runtime, &config, arguments.config.as_deref(), stop);
    }
    tracing::info!(
        job = config.name,
        run_id = config.run_id,
        rank = topology.rank(),
        world = topology.world(),
        version = env!("CARGO_PKG_VERSION"),
        elapsed_seconds = timeline.elapsed(),
        "started"
    );
    run::set_up_process(&topology);
    let ready = Readiness::new();
    let metrics = athanor_telemetry::metrics();
    let metrics_port = match variable(environment::METRICS_PORT) {
        Some(text) => Some(text.parse().map_err(|_| {
            TrainError::User(format!("environment variable {}: {text:?} is no port", environment::METRICS_PORT))
        })?),
        None => in_pod.then_some(port::TRAINER_METRICS),
    };
    if let Some(port) = metrics_port.filter(|_| topology.local_rank == 0) {
        runtime.spawn(ops::serve(port, metrics, ready.clone()));
    }
    ready.set(true);
    runtime.spawn(leave_when_stopped(stop.clone(), timeline.clone()));
    let process = Process {
        runtime: runtime.handle().clone(),
        timeline,
        stop,
        watchdog: Watchdog::start(Duration::from_secs(config.spec.failure_policy.hang_seconds.into()), leave_when_hung),
        node: Node::join(&topology, variable(environment::NODE_FOLDER).map(PathBuf::from))?,
        terminal: std::io::stderr().is_terminal(),
        namespace: variable(environment::NAMESPACE).unwrap_or_default(),
        loss_log: variable(environment::LOSS_LOG).map(PathBuf::from),
    };
    if let Some(result) = run::run(&config, &topology, &process)? {
        if let Some(path) = termination::path(variable) {
            termination::write_result(&path, &result).map_err(TrainError::at(&path))?;
        }
        announce(&result);
    }
    Ok(exit_code::DONE)
}

/// Starts this machine's ranks. In a pod they read the mounted configuration and the pod's rendezvous; on a laptop both
/// are created here.
fn start_ranks(
    runtime: &Runtime,
    config: &TrainConfig,
    mounted: Option<&Path>,
    stop: CancellationToken,
) -> Result<i32, TrainError> {
    let processes = config.spec.distributed.processes_per_node as usize;
    let node = Work::create(&std::env::temp_dir())?;
    let folder = (environment::NODE_FOLDER, node.path().to_string_lossy().into_owned());
    if let Some(mounted) = mounted {
        return runtime.block_on(launch(mounted, processes, &[folder], stop));
    }
    let written = tempfile::Builder::new().suffix(".json").tempfile().map_err(TrainError::other)?;
    serde_json::to_writer(&written, config).map_err(TrainError::other)?;
    let port = std::net::TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr());
    let port = port.map_err(TrainError::other)?.port();
    let extra = [
        folder,
        (environment::MASTER_ADDR, "127.0.0.1".to_owned()),
        (environment::MASTER_PORT, port.to_string()),
        (environment::POD_IP, "127.0.0.1".to_owned()),
        (environment::METRICS_PORT, variable(environment::METRICS_PORT).unwrap_or_else(|| "0".into())),
    ];
    runtime.block_on(launch(written.path(), processes, &extra, stop))
}

/// Before training there is nothing to save; afterwards the loop gets some time to write a checkpoint.
async fn leave_when_stopped(stop: CancellationToken, timeline: Timeline) {
    stop.cancelled().await;
    if timeline.seconds().contains_key("dataReady") {
        tokio::time::sleep(STOP_PATIENCE).await;
    }
    tracing::warn!("stopped without a checkpoint");
    let error = TrainError::Stopped { step: 0, checkpoint: 0 };
    if let Some(path) = termination::path(variable) {
        let _ = termination::write_failure(&path, &error);
    }
    athanor_torch::exit_now(error.exit_code())
}

fn leave_when_hung(silent: Duration, watched: Watched) {
    let message = watched.hung(silent);
    tracing::error!(code = exit_code::HUNG, "{message}");
    if let Some(path) = termination::path(variable) {
        let _ = termination::write_result(&path, &TrainResult::Failed { message });
    }
    athanor_torch::exit_now(exit_code::HUNG)
}

/// Prints the result: as text on a terminal, else as one log line.
fn announce(result: &TrainResult) {
    let (TrainResult::Succeeded(summary) | TrainResult::GateFailed(summary)) = result else { return };
    if !std::io::stdout().is_terminal() {
        let result = serde_json::to_string(result).unwrap_or_default();
        tracing::info!(result, "finished");
        return;
    }
    println!("artifact  {}", summary.artifact);
    println!(
        "rows      {} train, {} validation, {} test",
        summary.rows.train, summary.rows.validation, summary.rows.test
    );
    for (name, value) in &summary.metrics {
        println!("{name:<28} {value}");
    }
    for gate in &summary.failed_gates {
        println!("gate failed: {gate}");
    }
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}
