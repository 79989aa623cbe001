//! `ebb bench history`: records what concurrent clients see, and checks it.

use crate::args::{BenchHistory, Cli};
use crate::exit::CliError;
use crate::{find, output};
use ebb_bench::history::{self, Counts, Plan};
use ebb_history::history::{Checked, History, Line};
use ebb_history::search::Limit;
use std::path::Path;
use std::time::Instant;

/// `ebb bench history`. Fails if there is no order, and if that is not known.
pub(crate) async fn run(cli: &Cli, args: &BenchHistory) -> Result<(), CliError> {
    let (history, recorded) = match &args.check {
        Some(path) => {
            let text = std::fs::read_to_string(path).map_err(|e| failed("read", path, &e))?;
            let history = History::parse(&text)
                .map_err(|e| CliError::usage(format!("{}: {e}", path.display())))?;
            (history, None)
        }
        None => {
            let (lines, seed, counts) = record(cli, args).await?;
            (History::new(lines), Some((seed, counts)))
        }
    };
    let began = Instant::now();
    let checked = history.check(Limit { configurations_max: args.limit });
    let check_ms = began.elapsed().as_millis() as u64;
    if cli.json {
        output::json(&serde_json::json!({
            "seed": recorded.as_ref().map(|r| r.0),
            "recorded": recorded.as_ref().map(|r| &r.1),
            "checked": checked,
            "check_ms": check_ms,
        }))?;
    } else {
        if let Some((seed, counts)) = &recorded {
            output::line(&format!("seed {seed}\n{}", history::table(counts)))?;
        }
        output::line(&table(&checked, check_ms))?;
    }
    match (checked.violations.as_slice(), checked.gave_up.as_slice()) {
        ([], []) => Ok(()),
        ([], given_up) => Err(CliError::new(format!(
            "whether {} trees have an order is not known: --limit says how long to look",
            given_up.len()
        ))),
        (bad, _) => Err(CliError::new(format!("{} trees have no order", bad.len()))),
    }
}

fn failed(what: &str, path: &Path, e: &std::io::Error) -> CliError {
    CliError::new(format!("cannot {what} {}: {e}", path.display()))
}

async fn record(cli: &Cli, args: &BenchHistory) -> Result<(Vec<Line>, u64, Counts), CliError> {
    let (addresses, key) = find::cluster(cli)?;
    let mut random = [0; 4];
    getrandom::fill(&mut random).map_err(|e| CliError::new(format!("no random bytes: {e}")))?;
    let seed = args.seed.unwrap_or(u32::from_le_bytes(random).into());
    let plan = Plan {
        seconds: args.seconds,
        clients: args.clients,
        hasty: args.hasty,
        readers: args.readers,
        followers: args.followers,
        trees: args.trees,
        names: args.names,
        seed,
        voters: if args.voters.is_empty() { addresses.clone() } else { args.voters.clone() },
        addresses,
        key,
    };
    let mut made = Ok(());
    let begun = || {
        if let Some(out) = &args.out {
            made = std::fs::write(out, "").map_err(|e| failed("write", out, &e));
        }
    };
    let (lines, counts) = history::run(&plan, begun).await?;
    made?;
    if let Some(out) = &args.out {
        let mut text = String::new();
        for line in &lines {
            let line = serde_json::to_string(line)
                .map_err(|e| CliError::new(format!("cannot print as JSON: {e}")))?;
            text += &line;
            text.push('\n');
        }
        std::fs::write(out, text).map_err(|e| failed("write", out, &e))?;
    }
    Ok((lines, seed, counts))
}

fn table(checked: &Checked, check_ms: u64) -> String {
    let mut text = format!(
        "{} operations, {} of them without an answer, in {} trees, {} in the largest, {} at once at most\n\
         {}: {} configurations in {check_ms} ms",
        checked.operations,
        checked.unknown,
        checked.partitions,
        checked.longest,
        checked.concurrent,
        if checked.linearizable { "linearizable" } else { "NOT shown to be linearizable" },
        checked.configurations,
    );
    for why in &checked.violations {
        text += "\n";
        text += why;
    }
    text
}
