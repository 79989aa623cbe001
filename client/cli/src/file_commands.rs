//! Commands on files, through the native library: no mount is needed.

use crate::args::{Cli, Cp, Ls, Mkdir, Mv, Paths, Rm};
use crate::copy::{Copier, Place};
use crate::exit::CliError;
use crate::{find, output};
use ebb_client::{
    Advice, Attr, ClientError, Cluster, Config, FileKind, FileSystem, OpenFlags, Owner, Time,
};
use std::io::Write;

impl From<ClientError> for CliError {
    fn from(e: ClientError) -> Self {
        match e {
            ClientError::Fs(e) => e.into(),
            ClientError::WrongKey(text) => Self::no_cluster(text),
            ClientError::Metadata(text) => {
                Self::no_cluster(format!("{text}; is the cluster up? (`ebb status`)"))
            }
            e => Self::new(e.to_string()),
        }
    }
}

/// A session of this command.
async fn connect(cli: &Cli) -> Result<FileSystem, CliError> {
    let (addresses, key) = find::cluster(cli)?;
    let label = format!("ebb command, pid {}", std::process::id());
    let config = Config { patience: std::time::Duration::from_secs(30), ..Config::default() };
    let cluster = Cluster::connect(addresses, key, &label, config).await?;
    Ok(FileSystem::new(&cluster))
}

/// Runs `work` in a session and closes the session whatever happens.
async fn with_fs<T>(
    cli: &Cli,
    work: impl AsyncFnOnce(&FileSystem) -> Result<T, CliError>,
) -> Result<T, CliError> {
    let fs = connect(cli).await?;
    let result = work(&fs).await;
    let closed = fs.close().await;
    let value = result?;
    closed?;
    Ok(value)
}

/// A path argument without its `ebb:`.
fn inside(path: &str) -> &[u8] {
    path.strip_prefix("ebb:").unwrap_or(path).as_bytes()
}

fn on(path: &str) -> impl Fn(ClientError) -> CliError + '_ {
    move |e| CliError::from(e).context(path)
}

fn me() -> Owner {
    Owner { uid: nix::unistd::geteuid().as_raw(), gid: nix::unistd::getegid().as_raw() }
}

/// The inode at a path, for commands about subtrees.
pub(crate) async fn resolve(cli: &Cli, path: &str) -> Result<Attr, CliError> {
    with_fs(cli, async |fs| fs.resolve(inside(path)).await.map_err(on(path))).await
}

/// `ebb cp`
pub(crate) async fn cp(cli: &Cli, args: &Cp) -> Result<(), CliError> {
    let Some((target, sources)) = args.paths.split_last() else {
        return Err(CliError::usage("ebb cp SOURCE… TARGET"));
    };
    let target = Place::parse(target);
    let started = std::time::Instant::now();
    let (mut files, mut directories, mut bytes) = (0, 0, 0);
    with_fs(cli, async |fs| {
        let into = is_directory(fs, &target).await;
        if sources.len() > 1 && !into {
            return Err(CliError::usage(format!("{target} is not a directory")));
        }
        for source in sources {
            let source = Place::parse(source);
            let exact = match (into, source.name()) {
                (true, Some(name)) => target.join(&name),
                _ => target.clone(),
            };
            let bar = output::bar(0, cli.json);
            bar.set_message(source.to_string());
            let copied = Copier::new(fs.clone(), bar.clone(), usize::from(args.jobs))
                .copy(&source, &exact, args.recursive)
                .await;
            bar.finish_and_clear();
            let copied = copied?;
            files += copied.files;
            directories += copied.directories;
            bytes += copied.bytes;
        }
        Ok(())
    })
    .await?;
    let ms = started.elapsed().as_millis() as u64;
    if cli.json {
        return output::json(&serde_json::json!({
            "files": files, "directories": directories, "bytes": bytes, "ms": ms,
        }));
    }
    output::line(&format!(
        "{files} files, {directories} directories, {} in {}",
        output::bytes(bytes),
        output::age(ms)
    ))
}

async fn is_directory(fs: &FileSystem, place: &Place) -> bool {
    match place {
        Place::Local(path) => path.is_dir(),
        Place::Ebb(path) => {
            fs.resolve_following(path).await.is_ok_and(|a| a.kind == FileKind::Directory)
        }
    }
}

/// `ebb ls`
pub(crate) async fn ls(cli: &Cli, args: &Ls) -> Result<(), CliError> {
    with_fs(cli, async |fs| {
        let attr = fs.resolve_following(inside(&args.path)).await.map_err(on(&args.path))?;
        let entries = if attr.kind == FileKind::Directory {
            fs.list(attr.inode)
                .await
                .map_err(on(&args.path))?
                .into_iter()
                .map(|e| (e.name, e.attr))
                .collect()
        } else {
            vec![(inside(&args.path).to_vec(), attr)]
        };
        if cli.json {
            let rows: Vec<_> = entries.iter().map(|(n, a)| describe(n, a)).collect();
            return output::json(&rows);
        }
        for (name, attr) in &entries {
            let name = String::from_utf8_lossy(name);
            if args.long {
                output::line(&long(&name, attr))?;
            } else {
                output::line(&name)?;
            }
        }
        Ok(())
    })
    .await
}

/// `ebb cat`
pub(crate) async fn cat(cli: &Cli, args: &Paths) -> Result<(), CliError> {
    with_fs(cli, async |fs| {
        for path in &args.paths {
            let attr = fs.resolve_following(inside(path)).await.map_err(on(path))?;
            let file = fs.open(attr.inode, OpenFlags::default()).await.map_err(on(path))?;
            fs.advise(file.handle, 0..attr.size, Advice::Sequential).map_err(on(path))?;
            let mut at = 0;
            let result = loop {
                match fs.read(file.handle, at, 1 << 20).await {
                    Ok(block) if block.is_empty() => break Ok(()),
                    Ok(block) => {
                        at += block.len() as u64;
                        match std::io::stdout().lock().write_all(&block) {
                            Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => {
                                std::process::exit(0)
                            }
                            Err(e) => break Err(CliError::new(format!("cannot print: {e}"))),
                            Ok(()) => {}
                        }
                    }
                    Err(e) => break Err(on(path)(e)),
                }
            };
            let _ = fs.release(file.handle).await;
            result?;
        }
        Ok(())
    })
    .await
}

/// `ebb stat`
pub(crate) async fn stat(cli: &Cli, args: &Paths) -> Result<(), CliError> {
    with_fs(cli, async |fs| {
        let mut rows = Vec::new();
        for path in &args.paths {
            let attr = fs.resolve(inside(path)).await.map_err(on(path))?;
            if cli.json {
                rows.push(describe(inside(path), &attr));
                continue;
            }
            output::line(&long(path, &attr))?;
            output::line(&format!(
                "  inode {:#x}, generation {}, content {}, {}",
                attr.inode.0,
                attr.generation,
                attr.content,
                if attr.dirty { "not in S3 yet" } else { "in S3" }
            ))?;
        }
        if cli.json { output::json(&rows) } else { Ok(()) }
    })
    .await
}

fn describe(name: &[u8], a: &Attr) -> serde_json::Value {
    serde_json::json!({
        "name": String::from_utf8_lossy(name), "inode": a.inode.0,
        "kind": match a.kind { FileKind::File | FileKind::HardLink => "file", FileKind::Directory => "directory", FileKind::Symlink => "symlink" },
        "mode": format!("{:04o}", a.mode), "uid": a.uid, "gid": a.gid, "size": a.size, "links": a.nlink,
        "mtime_ns": a.mtime.0, "generation": a.generation.0, "dirty": a.dirty,
    })
}

fn long(name: &str, a: &Attr) -> String {
    let kind = match a.kind {
        FileKind::File | FileKind::HardLink => '-',
        FileKind::Directory => 'd',
        FileKind::Symlink => 'l',
    };
    let bits: String = (0..9)
        .rev()
        .map(|bit| if a.mode >> bit & 1 == 1 { ['x', 'w', 'r'][bit % 3] } else { '-' })
        .collect();
    format!(
        "{kind}{bits} {:>5} {:>5} {:>12} {} {name}{}",
        a.uid,
        a.gid,
        a.size,
        date(a.mtime),
        if a.dirty { " *" } else { "" }
    )
}

fn date(t: Time) -> String {
    let format = time::macros::format_description!("[year]-[month]-[day] [hour]:[minute]:[second]");
    time::OffsetDateTime::from_unix_timestamp_nanos(i128::from(t.0))
        .ok()
        .and_then(|t| t.format(&format).ok())
        .unwrap_or_else(|| t.0.to_string())
}

/// `ebb mkdir`
pub(crate) async fn mkdir(cli: &Cli, args: &Mkdir) -> Result<(), CliError> {
    with_fs(cli, async |fs| {
        for path in &args.paths {
            if !args.parents {
                let (parent, name) = fs.resolve_parent(inside(path)).await.map_err(on(path))?;
                fs.mkdir(parent.inode, &name, 0o755, me()).await.map_err(on(path))?;
                continue;
            }
            let mut dir = fs.resolve(b"/").await.map_err(on("/"))?.inode;
            for name in ebb_client::path::components(inside(path)).map_err(on(path))? {
                dir = match fs.mkdir(dir, &name, 0o755, me()).await {
                    Ok(attr) => attr.inode,
                    Err(e) if e.errno() == nix::libc::EEXIST => {
                        let attr = fs.lookup(dir, &name).await.map_err(on(path))?;
                        if attr.kind != FileKind::Directory {
                            return Err(on(path)(e));
                        }
                        attr.inode
                    }
                    Err(e) => return Err(on(path)(e)),
                };
            }
        }
        Ok(())
    })
    .await
}

/// `ebb mv`
pub(crate) async fn mv(cli: &Cli, args: &Mv) -> Result<(), CliError> {
    with_fs(cli, async |fs| {
        let (parent, name) =
            fs.resolve_parent(inside(&args.source)).await.map_err(on(&args.source))?;
        let (new_parent, new_name) = match fs.resolve_following(inside(&args.target)).await {
            Ok(attr) if attr.kind == FileKind::Directory => (attr.inode, name.clone()),
            _ => {
                let (dir, name) =
                    fs.resolve_parent(inside(&args.target)).await.map_err(on(&args.target))?;
                (dir.inode, name)
            }
        };
        fs.rename(parent.inode, &name, new_parent, &new_name, 0).await.map_err(on(&args.source))
    })
    .await
}

/// `ebb rm`
pub(crate) async fn rm(cli: &Cli, args: &Rm) -> Result<(), CliError> {
    with_fs(cli, async |fs| {
        for path in &args.paths {
            match remove(fs, path, args.recursive).await {
                Err(RemoveError::Missing) if args.force => {}
                Err(RemoveError::Missing) => {
                    return Err(CliError::new(format!("{path}: no such file or directory")));
                }
                Err(RemoveError::Other(e)) => return Err(e),
                Ok(()) => {}
            }
        }
        Ok(())
    })
    .await
}

enum RemoveError {
    Missing,
    Other(CliError),
}

async fn remove(fs: &FileSystem, path: &str, recursive: bool) -> Result<(), RemoveError> {
    let told = |e: ClientError| {
        if e.errno() == nix::libc::ENOENT {
            RemoveError::Missing
        } else {
            RemoveError::Other(on(path)(e))
        }
    };
    let attr = fs.resolve(inside(path)).await.map_err(told)?;
    let (parent, name) = fs.resolve_parent(inside(path)).await.map_err(told)?;
    if attr.kind != FileKind::Directory {
        return fs.unlink(parent.inode, &name).await.map_err(told);
    }
    if !recursive {
        return Err(RemoveError::Other(CliError::usage(format!(
            "{path} is a directory: use --recursive"
        ))));
    }
    // Depth first without recursion; a directory is removed when its listing is empty.
    let mut stack = vec![(parent.inode, name, attr.inode)];
    while let Some((above, name, dir)) = stack.last().cloned() {
        let (page, _) = fs.readdir(dir, b"", 256).await.map_err(told)?;
        if page.is_empty() {
            fs.rmdir(above, &name).await.map_err(told)?;
            stack.pop();
            continue;
        }
        let mut down = None;
        for entry in page {
            if entry.attr.kind == FileKind::Directory {
                down = Some((dir, entry.name, entry.attr.inode));
            } else {
                fs.unlink(dir, &entry.name).await.map_err(told)?;
            }
        }
        stack.extend(down);
    }
    Ok(())
}
