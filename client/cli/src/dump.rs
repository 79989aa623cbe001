//! `ebb meta dump` and `ebb meta load`: the namespace as text, out of a cluster and into a new one.

use crate::args::{Cli, MetaDump, MetaLoad};
use crate::exit::CliError;
use crate::meta_commands::call;
use crate::{find, output};
use ebb_metaplane_protocol::dump::{
    DUMP_VERSION, End, Head, LoadStep, RECORD_BYTES_MAX, RECORDS_MAX, Record,
};
use ebb_metaplane_protocol::{AdminCall, AdminReply};
use ebb_rpc::MetaClient;
use serde_json::json;
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// One call.
const PATIENCE: Duration = Duration::from_secs(60);

fn cannot(what: &str, path: &Path, e: impl std::fmt::Display) -> CliError {
    CliError::new(format!("cannot {what} {}: {e}", path.display()))
}

/// Bytes on their way to a file, and their checksum.
struct Lines<W> {
    out: W,
    crc: crc_fast::Digest,
}

fn digest() -> crc_fast::Digest {
    crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi)
}

impl<W: Write> Lines<W> {
    fn line(&mut self, value: &impl serde::Serialize) -> std::io::Result<()> {
        let mut text = serde_json::to_vec(value)?;
        text.push(b'\n');
        self.crc.update(&text);
        self.out.write_all(&text)
    }
}

/// A file that is there under its name when it is whole, or not at all.
enum Target {
    Stdout,
    File { temporary: PathBuf, path: PathBuf },
}

impl Target {
    fn open(to: &MetaDump) -> Result<(Self, Box<dyn Write>), CliError> {
        let path = to.file.clone();
        if path.as_os_str() == "-" {
            return Ok((Self::Stdout, Box::new(std::io::stdout().lock())));
        }
        if !to.force && path.exists() {
            return Err(CliError::new(format!(
                "{} is there already (--force replaces it)",
                path.display()
            )));
        }
        let mut name = path.file_name().map(ToOwned::to_owned).unwrap_or_default();
        name.push(".part");
        let temporary = path.with_file_name(name);
        let file = File::create(&temporary).map_err(|e| cannot("write", &temporary, e))?;
        Ok((Self::File { temporary, path }, Box::new(file)))
    }

    fn finish(self) -> Result<(), CliError> {
        let Self::File { temporary, path } = self else { return Ok(()) };
        let dir = match path.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir,
            _ => Path::new("."),
        };
        let publish = || {
            File::open(&temporary)?.sync_all()?;
            std::fs::rename(&temporary, &path)?;
            File::open(dir)?.sync_all()
        };
        publish().map_err(|e| cannot("write", &path, e))
    }

    fn give_up(&self) {
        if let Self::File { temporary, .. } = self {
            let _ = std::fs::remove_file(temporary);
        }
    }
}

/// `ebb meta dump`
pub(crate) async fn dump(cli: &Cli, to: &MetaDump) -> Result<(), CliError> {
    let meta = find::meta(cli)?;
    let (target, out) = Target::open(to)?;
    let end = match write(cli, &meta, out, &to.file).await {
        Ok(end) => end,
        Err(e) => {
            target.give_up();
            return Err(e);
        }
    };
    let to_stdout = matches!(target, Target::Stdout);
    target.finish()?;
    match (to_stdout, cli.json) {
        (true, _) => Ok(()),
        (_, true) => output::json(&json!({ "records": end.end, "unstored": end.unstored })),
        (_, false) => {
            output::line(&format!("{} names to {}", end.end, to.file.display()))?;
            if end.unstored > 0 {
                output::line(&format!(
                    "{} files have bytes that only data nodes have: they are not in it (`ebb flush / --wait` first)",
                    end.unstored
                ))?;
            }
            Ok(())
        }
    }
}

async fn write(
    cli: &Cli,
    meta: &MetaClient,
    out: Box<dyn Write>,
    path: &Path,
) -> Result<End, CliError> {
    let bar = output::counter("dumping", cli.json);
    let failed = |e| cannot("write", path, e);
    let mut lines = Lines { out: BufWriter::with_capacity(1 << 20, out), crc: digest() };
    let mut end = End { end: 0, unstored: 0, crc32c: 0 };
    let mut from = None;
    loop {
        let page = match call(meta, AdminCall::Dump(from.take()), PATIENCE).await? {
            AdminReply::Dump(page) => page,
            other => return Err(CliError::new(format!("unexpected reply {other:?}"))),
        };
        if end.end == 0 {
            let (cluster, taken_ns) = (page.cluster, page.taken.0);
            let head = Head { ebb_dump: DUMP_VERSION, cluster, taken_ns, records: page.inodes };
            lines.line(&head).map_err(failed)?;
        }
        for record in &page.records {
            lines.line(record).map_err(failed)?;
            end.end += 1;
            end.unstored += u64::from(record.unstored);
        }
        bar.set_length(page.inodes.max(end.end));
        bar.set_position(end.end);
        match page.next {
            Some(next) => from = Some((page.dump, next)),
            None => break,
        }
    }
    // CRC-32C fits 32 bits; the library's common type is wider.
    end.crc32c = lines.crc.finalize() as u32;
    lines.line(&end).map_err(failed)?;
    lines.out.flush().map_err(failed)?;
    bar.finish_and_clear();
    Ok(end)
}

/// A dump being read.
struct Dump {
    from: BufReader<File>,
    path: PathBuf,
    line: Vec<u8>,
    number: u64,
    crc: crc_fast::Digest,
}

impl Dump {
    fn open(path: &Path) -> Result<(Self, Head), CliError> {
        let file = File::open(path).map_err(|e| cannot("read", path, e))?;
        let from = BufReader::with_capacity(1 << 20, file);
        let mut dump =
            Self { from, path: path.to_owned(), line: Vec::new(), number: 0, crc: digest() };
        dump.next()?;
        let head: Head = serde_json::from_slice(&dump.line)
            .map_err(|_| dump.damaged("it does not begin as a dump of `ebb meta dump` does"))?;
        if head.ebb_dump != DUMP_VERSION {
            return Err(dump.damaged(&format!(
                "it is of version {}, and this ebb reads version {DUMP_VERSION}",
                head.ebb_dump
            )));
        }
        dump.count();
        Ok((dump, head))
    }

    fn damaged(&self, why: &str) -> CliError {
        CliError::new(format!("{}, line {}: {why}", self.path.display(), self.number))
    }

    fn count(&mut self) {
        self.crc.update(&self.line);
    }

    /// Reads a line, which is not counted in yet.
    fn next(&mut self) -> Result<(), CliError> {
        self.line.clear();
        self.number += 1;
        let limit = RECORD_BYTES_MAX as u64;
        let mut limited = self.from.by_ref().take(limit);
        let read = limited.read_until(b'\n', &mut self.line);
        read.map_err(|e| cannot("read", &self.path, e))?;
        match self.line.last() {
            Some(b'\n') => Ok(()),
            None => Err(self.damaged("it ends here: the dump is not whole")),
            Some(_) => Err(self.damaged("cut off, or too long a line")),
        }
    }

    /// The next record; `None`: that was all, and all of it is right.
    fn record(&mut self) -> Result<Option<Record>, CliError> {
        self.next()?;
        if let Ok(end) = serde_json::from_slice::<End>(&self.line) {
            if end.crc32c != self.crc.finalize() as u32 || end.end != self.number - 2 {
                return Err(self.damaged("the lines before do not match their checksum"));
            }
            return Ok(None);
        }
        let record =
            serde_json::from_slice(&self.line).map_err(|e| self.damaged(&e.to_string()))?;
        self.count();
        Ok(Some(record))
    }
}

/// What is in a dump.
#[derive(Default)]
struct Content {
    records: u64,
    reverted: u64,
    lost: u64,
}

/// Reads a dump to its end: nothing is loaded of one that is not whole.
fn look(path: &Path) -> Result<Content, CliError> {
    let (mut dump, _) = Dump::open(path)?;
    let mut content = Content::default();
    while let Some(r) = dump.record()? {
        content.records += 1;
        match (r.unstored, r.object.is_some()) {
            (true, true) => content.reverted += 1,
            (true, false) => content.lost += 1,
            _ => {}
        }
    }
    Ok(content)
}

/// `ebb meta load`
pub(crate) async fn load(cli: &Cli, from: &MetaLoad) -> Result<(), CliError> {
    let spinner = output::spinner(&format!("reading {}", from.file.display()), cli.json);
    let path = from.file.clone();
    let looked = tokio::task::spawn_blocking(move || look(&path)).await;
    spinner.finish_and_clear();
    let content = looked.map_err(|e| CliError::new(e.to_string()))??;
    if content.reverted + content.lost > 0 && !from.give_up_unstored {
        return Err(CliError::new(format!(
            "only data nodes had the newest bytes of {} files: {} go back to their last object in the bucket, {} never \
             were there and are lost. --give-up-unstored loads the dump all the same",
            content.reverted + content.lost,
            content.reverted,
            content.lost
        )));
    }
    let meta = find::meta(cli)?;
    let step = |step, records| AdminCall::Load(step, records);
    call(&meta, step(LoadStep::Begin, Vec::new()), PATIENCE).await?;
    let bar = output::counter("loading", cli.json);
    bar.set_length(content.records);
    let (mut dump, _) = Dump::open(&from.file)?;
    let mut page = Vec::new();
    loop {
        let record = dump.record()?;
        let over = record.is_none();
        page.extend(record);
        if page.len() == RECORDS_MAX || (over && !page.is_empty()) {
            bar.inc(page.len() as u64);
            call(&meta, step(LoadStep::Records, std::mem::take(&mut page)), PATIENCE).await?;
        }
        if over {
            break;
        }
    }
    call(&meta, step(LoadStep::End, Vec::new()), PATIENCE).await?;
    bar.finish_and_clear();
    let Content { records, reverted, lost } = content;
    if cli.json {
        return output::json(&json!({ "records": records, "reverted": reverted, "lost": lost }));
    }
    output::line(&format!("{records} names from {}", from.file.display()))?;
    if reverted + lost > 0 {
        output::line(&format!("{reverted} files went back to their last object, {lost} are lost"))?;
    }
    Ok(())
}
