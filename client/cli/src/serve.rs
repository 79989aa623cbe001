//! `ebb serve …`: one server of a cluster. `ebb up` starts these; in production systemd does.

use crate::args::{ConfigFile, Serve, ServeWhat};
use crate::exit::CliError;
use crate::launch::{LocalLaunch, S3Config};
use ebb_controller::Layout;
use std::path::{Path, PathBuf};
use tokio::signal::unix::{SignalKind, signal};

/// Runs a server until SIGTERM or SIGINT.
pub(crate) async fn serve(args: &Serve) -> Result<(), CliError> {
    match &args.what {
        ServeWhat::S3(file) => {
            let config: S3Config = read(file)?;
            told(config.ready_file.clone(), s3(config).await)
        }
        ServeWhat::Meta(file) => {
            let config: ebb_metaplane::MetaConfig = read(file)?;
            let ready = config.ready_file.clone();
            let result = ebb_metaplane::run(config, stop()?).await;
            told(ready, result.map_err(of_meta))
        }
        ServeWhat::Data(file) => {
            let config: ebb_dataplane::NodeConfig = read(file)?;
            let ready = config.ready_file.clone();
            let result = ebb_dataplane::run(config, stop()?).await;
            told(ready, result.map_err(|e| CliError::new(e.to_string())))
        }
        ServeWhat::Controller { directory } => {
            let layout = Layout::new(directory);
            Ok(ebb_controller::run(layout, LocalLaunch::new()?, stop()?).await?)
        }
    }
}

/// S3's faults have an exit code of their own.
fn of_meta(e: ebb_metaplane::MetaError) -> CliError {
    use ebb_metaplane::MetaError;
    let text = e.to_string();
    match e {
        MetaError::NoBucket { .. } | MetaError::Denied { .. } | MetaError::S3Down { .. } => {
            CliError::s3(text)
        }
        MetaError::Owned { .. } => CliError::unsafe_to_go_on(text),
        _ => CliError::new(text),
    }
}

/// Leaves the reason of a failed start beside the ready file, where `ebb up` looks for it.
fn told(ready: Option<PathBuf>, result: Result<(), CliError>) -> Result<(), CliError> {
    if let (Some(ready), Err(e)) = (ready, &result) {
        let _ = std::fs::write(ready.with_extension("failed"), format!("{}\n{e}", e.code()));
    }
    result
}

fn read<T: serde::de::DeserializeOwned>(file: &ConfigFile) -> Result<T, CliError> {
    let text = std::fs::read_to_string(&file.config)
        .map_err(|e| CliError::usage(format!("{}: {e}", file.config.display())))?;
    toml::from_str(&text).map_err(|e| CliError::usage(format!("{}: {e}", file.config.display())))
}

/// Resolves at SIGTERM or SIGINT.
fn stop() -> Result<impl Future<Output = ()> + Send + 'static, CliError> {
    let failed = |e: std::io::Error| CliError::new(format!("cannot wait for signals: {e}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

async fn s3(config: S3Config) -> Result<(), CliError> {
    let failed = |e: ebb_s3::server::ServerError| CliError::s3(e.to_string());
    let stopped = stop()?;
    let server = ebb_s3::server::EmbeddedServer::start(config.server).await.map_err(failed)?;
    if let Some(path) = &config.ready_file {
        write_ready(path, &serde_json::json!({ "address": server.local_addr().to_string() }))?;
    }
    tracing::info!(address = %server.local_addr(), "serving S3");
    stopped.await;
    server.shutdown().await;
    Ok(())
}

fn write_ready(path: &Path, value: &serde_json::Value) -> Result<(), CliError> {
    Ok(ebb_controller::layout::write_atomically(path, value.to_string().as_bytes(), 0o644)?)
}
