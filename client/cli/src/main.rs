//! `ebb`: the one binary. Parses arguments, calls the libraries, turns errors into one line that
//! says what to do, and an exit code ([`exit`]).

mod args;
mod bench_commands;
mod bench_engines;
mod bench_history;
mod cluster_commands;
mod copy;
mod dump;
mod exit;
mod file_commands;
mod find;
mod fsck;
mod fsck_namespace;
mod launch;
mod meta_commands;
mod mount_commands;
mod node_commands;
mod output;
mod serve;
mod up;

use args::{Cli, Command};
use clap::Parser;
use exit::CliError;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    let cli = Cli::parse();
    init_logging(&cli);
    let outcome = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(worker_threads())
        .enable_all()
        .build()
        .map_err(|e| CliError::new(format!("cannot start the runtime: {e}")))
        .and_then(|runtime| {
            let result = runtime.block_on(run(&cli));
            // Background tasks (renewals, readahead) must not hold the exit up.
            runtime.shutdown_background();
            result
        });
    match outcome {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ebb: {error}");
            std::process::ExitCode::from(error.code())
        }
    }
}

/// Threads of the runtime: one for two cores, eight at most. These processes mostly pass small
/// messages on, and a message that changes threads on its way costs more than a second thread gains;
/// the other cores have the kernel, the FUSE threads and the neighbours to run.
fn worker_threads() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    (cores / 2).clamp(1, 8)
}

fn init_logging(cli: &Cli) {
    use std::io::IsTerminal;
    // Servers log to their log files; commands stay quiet unless asked.
    // s3s calls every 404 and 412 an error; here they are answers. openraft warns of a voter that is away
    // with each heartbeat; `ebb meta list` says it, and who doesn't lead says so.
    let default = if matches!(cli.command, Command::Serve(_)) {
        "info,s3s=off,openraft=error"
    } else {
        "error"
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("EBB_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}

async fn run(cli: &Cli) -> Result<(), CliError> {
    match &cli.command {
        Command::Up(a) => up::up(cli, a).await,
        Command::Down(a) => up::down(cli, a).await,
        Command::Status => cluster_commands::status(cli).await,
        Command::Node(a) => node_commands::node(cli, a).await,
        Command::Meta(a) => meta_commands::meta(cli, a).await,
        Command::Scale(a) => cluster_commands::scale(cli, a).await,
        Command::Flush(a) => cluster_commands::flush(cli, a).await,
        Command::Evict(a) => cluster_commands::evict(cli, a).await,
        Command::Warm(a) => cluster_commands::warm(cli, a).await,
        Command::Fsck(a) => fsck::fsck(cli, a).await,
        Command::Env => cluster_commands::env(cli),
        Command::Mount(a) => mount_commands::mount(cli, a).await,
        Command::Umount(a) => mount_commands::umount(a).await,
        Command::Cp(a) => file_commands::cp(cli, a).await,
        Command::Ls(a) => file_commands::ls(cli, a).await,
        Command::Cat(a) => file_commands::cat(cli, a).await,
        Command::Stat(a) => file_commands::stat(cli, a).await,
        Command::Mkdir(a) => file_commands::mkdir(cli, a).await,
        Command::Mv(a) => file_commands::mv(cli, a).await,
        Command::Rm(a) => file_commands::rm(cli, a).await,
        Command::Bench(a) => bench_commands::bench(cli, a).await,
        Command::Serve(a) => serve::serve(a).await,
    }
}
