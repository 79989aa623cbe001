//! A client of the native library.

use super::dice::Dice;
use super::record::{Recorder, listed, opened, refused, shows};
use super::{Came, Plan};
use crate::BenchError;
use ebb_client::{ClientError, FileHandle, FileSystem, InodeId, OpenFlags, Owner, SetAttr};
use ebb_history::history::{Answer, Name, Operation};
use ebb_metaplane_protocol::query::PAGE_ENTRIES_MAX;
use std::sync::Arc;

const KIND: &str = "by the library";
/// Looks after each operation of a client that remembers.
const LOOKS: usize = 6;

pub(super) struct Client {
    fs: FileSystem,
    label: String,
    dice: Dice,
    /// Looks around after each operation: it remembers what it is told, and mostly need not ask.
    looks: bool,
    /// Files that it made and will close before its next operation: they are there for everybody already.
    open: Vec<(FileHandle, usize, Operation)>,
}

fn bytes(name: Name) -> Vec<u8> {
    name.to_string().into_bytes()
}

fn failed(error: &ClientError) -> Came {
    match error {
        ClientError::Fs(e) => refused(e),
        ClientError::Stale => refused(&ebb_metaplane_protocol::FsError::Stale),
        e => Came::Unclear(kind_of(e)),
    }
}

/// Without numbers and addresses, so that equal ones are counted together.
fn kind_of(error: &ClientError) -> String {
    match error {
        ClientError::Metadata(_) => "the metadata plane did not answer".into(),
        ClientError::Data { .. } => "a data node did not answer".into(),
        e => e.to_string(),
    }
}

impl Client {
    pub(super) async fn connect(plan: &Plan, n: u32, dice: Dice) -> Result<Self, BenchError> {
        // Every second one remembers what it was told.
        let label = format!("ebb bench history, client {n}");
        let (_, fs) = super::connect(plan, &label, n % 2 == 1 && !plan.followers).await?;
        Ok(Self { looks: n % 2 == 1, ..Self::of(fs, &format!("client {n}"), dice) })
    }

    pub(super) fn of(fs: FileSystem, label: &str, dice: Dice) -> Self {
        Self { fs, label: label.to_owned(), dice, looks: false, open: Vec::new() }
    }

    /// Works until the time is over.
    pub(super) async fn work(mut self, recorder: Arc<Recorder>, names: u16) {
        while !recorder.is_over() {
            let (tree, operation) = self.dice.operation(&recorder, names, true);
            let made = self.does(&recorder, tree, operation).await;
            if let (Operation::Mkdir { .. }, Some(Answer::Seen(dir))) = (operation, made) {
                self.fill(&recorder, tree, dir.inode, names).await;
            }
            self.close_all(&recorder).await;
            for _ in 0..if self.looks { LOOKS } else { 0 } {
                let (tree, operation) = self.dice.look(&recorder, names);
                self.reads(&recorder, tree, operation).await;
            }
        }
        let remembered = self.fs.cluster().lease_counts();
        let followed = self.fs.cluster().followed();
        recorder.count(|c| {
            c.followed += followed;
            c.answered_from_memory += remembered.hits;
            c.recalled += remembered.recalls;
        });
        // Its session ends with it.
        let _ = self.fs.close().await;
    }

    /// Makes files in a directory that it just made: its names are lent to this client, which soon answers creates
    /// itself, while others look.
    async fn fill(&mut self, recorder: &Recorder, tree: usize, parent: u64, names: u16) {
        recorder.fills(tree, parent);
        for _ in 0..self.dice.below(8) {
            let name = self.dice.name(names);
            let operation = Operation::Create { parent, name, exclusive: true };
            self.does(recorder, tree, operation).await;
            if self.dice.once_in(3) {
                self.close_all(recorder).await;
            }
        }
        self.close_all(recorder).await;
        recorder.filled(tree, parent);
    }

    async fn close_all(&mut self, recorder: &Recorder) {
        for (handle, tree, made) in std::mem::take(&mut self.open) {
            let Err(e) = self.fs.release(handle).await else { continue };
            // A new file whose last close nobody answered may be lost, as docs/SEMANTICS.md says.
            if let Operation::Create { parent, name, .. } = made {
                let why = format!("a close: {}", kind_of(&e));
                let lost = Operation::Unlink { parent, name };
                let who = (KIND, self.label.as_str());
                recorder.did(who, tree, recorder.now(), lost, Came::Unclear(why));
            }
        }
    }

    /// An operation from its call to its return; the answer.
    async fn does(
        &mut self,
        recorder: &Recorder,
        tree: usize,
        operation: Operation,
    ) -> Option<Answer> {
        let called = recorder.now();
        let came = match operation {
            Operation::Create { parent, name, exclusive } => {
                self.create(recorder, tree, (parent, name, exclusive)).await
            }
            Operation::Write { inode, end } => self.write(inode, end).await,
            other => self.asks(other).await,
        };
        let answer = match &came {
            Came::Answer(answer) => Some(answer.clone()),
            Came::Unclear(_) => None,
        };
        let is_alone = self.fs.unnamed_files() > 0 || matches!(operation, Operation::Mkdir { .. });
        recorder.did_maybe_alone((KIND, &self.label), tree, called, operation, came, is_alone);
        answer
    }

    /// The same of a read.
    pub(super) async fn reads(&self, recorder: &Recorder, tree: usize, operation: Operation) {
        let called = recorder.now();
        let came = self.asks(operation).await;
        recorder.did((KIND, &self.label), tree, called, operation, came);
    }

    async fn create(
        &mut self,
        recorder: &Recorder,
        tree: usize,
        (parent, name, exclusive): (u64, Name, bool),
    ) -> Came {
        let flags = OpenFlags { write: true, truncate: false, exclusive };
        let alone = self.fs.unnamed_files();
        let made =
            self.fs.create(InodeId(parent), &bytes(name), 0o644, Owner::default(), flags).await;
        let file = match made {
            Ok(file) => file,
            Err(e) => return failed(&e),
        };
        let answer = opened(&file.attr, file.created);
        if self.fs.unnamed_files() > alone {
            recorder.count(|c| c.answered_alone += 1);
        }
        if file.created && self.dice.once_in(2) {
            let made = Operation::Create { parent, name, exclusive };
            self.open.push((file.handle, tree, made));
            return Came::Answer(answer);
        }
        match self.fs.release(file.handle).await {
            Ok(()) => Came::Answer(answer),
            // It was opened; only of a new file the close decides.
            Err(_) if !file.created => Came::Answer(answer),
            Err(e) => Came::Unclear(format!("a close: {}", kind_of(&e))),
        }
    }

    async fn write(&mut self, inode: u64, end: u64) -> Came {
        let flags = OpenFlags { write: true, ..OpenFlags::default() };
        let file = match self.fs.open(InodeId(inode), flags).await {
            Ok(file) => file,
            Err(e) => return failed(&e),
        };
        let from = end.saturating_sub(1 + self.dice.next() % 5_000);
        let data = vec![self.dice.next() as u8; (end - from) as usize];
        let written = self.fs.write(file.handle, from, &data).await;
        let closed = self.fs.release(file.handle).await;
        match written.and(closed) {
            Ok(()) => Came::Answer(Answer::Done),
            Err(e) => Came::Unclear(format!("a write: {}", kind_of(&e))),
        }
    }

    async fn asks(&self, operation: Operation) -> Came {
        let fs = &self.fs;
        let done = |()| Answer::Done;
        let result = match operation {
            Operation::Mkdir { parent, name } => {
                let made = fs.mkdir(InodeId(parent), &bytes(name), 0o755, Owner::default()).await;
                made.map(|attr| shows(&attr))
            }
            Operation::Unlink { parent, name } => {
                fs.unlink(InodeId(parent), &bytes(name)).await.map(done)
            }
            Operation::Rmdir { parent, name } => {
                fs.rmdir(InodeId(parent), &bytes(name)).await.map(done)
            }
            Operation::Rename { parent, name, new_parent, new_name, flags } => {
                let (from, to) = (InodeId(parent), InodeId(new_parent));
                fs.rename(from, &bytes(name), to, &bytes(new_name), flags).await.map(done)
            }
            Operation::Truncate { inode, size } => {
                let set = SetAttr { size: Some(size), ..SetAttr::default() };
                fs.setattr(InodeId(inode), set).await.map(|attr| shows(&attr))
            }
            Operation::Lookup { parent, name } => {
                fs.lookup(InodeId(parent), &bytes(name)).await.map(|attr| shows(&attr))
            }
            Operation::Stat { inode } => fs.getattr(InodeId(inode)).await.map(|attr| shows(&attr)),
            Operation::List { inode } => {
                let page = fs.readdir(InodeId(inode), b"", PAGE_ENTRIES_MAX).await;
                page.map(|(entries, end)| listed(&entries, end))
            }
            Operation::Create { .. } | Operation::Write { .. } => {
                return Came::Unclear("not asked".into());
            }
        };
        result.map_or_else(|e| failed(&e), Came::Answer)
    }
}
