//! `pswitch serve`.

use std::io::IsTerminal as _;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use pswitch_controller::{
    Config, ControllerError, HttpOptions, HttpServer, InferenceService, Metrics, Server,
};
use pswitch_worker::Zygote;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use super::worker;
use crate::args::Serve;
use crate::exit::{Classify as _, Failure};
use crate::progress::Progress;

/// Time that accepted requests have to finish after SIGTERM.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);

pub(crate) fn run(args: Serve) -> anyhow::Result<()> {
    let config = Config::load(args.config.as_deref(), args.overrides()).class(Failure::Input)?;
    let progress = Progress::new();
    let filter = EnvFilter::try_new(&config.log)
        .with_context(|| format!("`{}` is no log filter", config.log))
        .class(Failure::Input)?;
    let writer = progress.log_writer();
    let terminal = std::io::stderr().is_terminal();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(terminal)
        .with_writer(move || writer.clone())
        .init();
    // Before the first thread: a process with threads cannot be forked safely.
    let zygote = Zygote::fork(worker).context("cannot fork the zygote")?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start threads")?;
    let result = runtime.block_on(serve(config, zygote, &progress));
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

async fn serve(config: Config, zygote: Zygote, progress: &Progress) -> anyhow::Result<()> {
    // Signals from here on lead to an orderly end, also while models are loaded.
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen to SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen to SIGINT")?;
    let http = config.http.clone();
    let observer = progress.observer();
    let started = tokio::task::spawn_blocking(move || Server::start(config, zygote.channel, observer));
    let (server, pending) = match started.await.context("starting panicked")? {
        Err(error @ ControllerError::ReadRepository { .. }) => Err(error).class(Failure::Input)?,
        started => started?,
    };
    progress.pools(&server.pool_bytes());
    let options = HttpOptions { max_body_bytes: http.max_body_size.bytes(), ..HttpOptions::default() };
    let service: Arc<dyn InferenceService> = Arc::clone(&server) as _;
    let front_end = HttpServer::bind(http.address, service, Metrics::new(), options)
        .await
        .with_context(|| format!("cannot listen on {}; choose another address with --http", http.address))?;
    let address = front_end.address().to_string();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let mut serving = tokio::spawn(front_end.run(async {
        // A dropped sender stops it as well.
        let _ = stopped.await;
    }));
    let loading = async {
        server.load_all(pending).await;
        progress.finish(&address);
        std::future::pending::<()>().await;
    };
    let ended = tokio::select! {
        () = loading => "",
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "Ctrl-C",
        () = server.failed() => anyhow::bail!("the zygote is gone, and with it all workers, or a driver has failed"),
    };
    tracing::info!(reason = ended, "finishing what runs, refusing what is new");
    let drained = tokio::select! {
        drained = server.drain(DRAIN_TIMEOUT) => drained,
        // A second signal does not wait.
        _ = terminate.recv() => false,
        _ = interrupt.recv() => false,
    };
    let _ = stop.send(());
    if !drained {
        tracing::warn!("some requests were not finished in time");
        serving.abort();
    }
    tokio::select! {
        _ = &mut serving => {}
        // Nor does it wait for clients that are slow to take their answers.
        _ = terminate.recv() => serving.abort(),
        _ = interrupt.recv() => serving.abort(),
    }
    Ok(())
}
