//! Dispatch of commands. Thin: each concept has its own module.

use crate::counters::Counter;
use crate::directory::Directory;
use crate::inode::{Inode, Loaded};
use crate::kv::Kv;
use crate::tables::Ctx;
use crate::{Machine, Reader};
use ebb_dataplane_protocol::*;
use ebb_metaplane_protocol::command::{Command, CommandReply, LogEntry};
use ebb_metaplane_protocol::{FileKind, FsError, FsResult, Time};

impl Machine {
    /// Applies a log entry: one reply per command, in order. The same entries give the same bytes
    /// in every store.
    pub fn apply<K: Kv>(kv: &mut K, entry: &LogEntry) -> Vec<CommandReply> {
        entry
            .commands
            .iter()
            .map(|command| {
                let reply = match begin(kv, entry.now) {
                    Ok(mut ctx) => ctx.command(command),
                    Err(e) => CommandReply::Refused(e.to_string()),
                };
                kv.command_done();
                reply
            })
            .collect()
    }
}

/// Steps the sequence and the clock.
fn begin<K: Kv>(kv: &mut K, now: Time) -> FsResult<Ctx<'_, K>> {
    let clock = Reader(&*kv).clock()?;
    let mut ctx = Ctx { kv, now: now.max(clock), sequence: 0 };
    if ctx.now != clock {
        ctx.set_counter(Counter::Clock, ctx.now.0 as u64);
    }
    ctx.sequence = ctx.next(Counter::Sequence)?;
    Ok(ctx)
}

fn done(result: FsResult<()>) -> CommandReply {
    match result {
        Ok(()) => CommandReply::Done,
        Err(e) => refused(&e),
    }
}

fn refused(e: &FsError) -> CommandReply {
    CommandReply::Refused(match e {
        FsError::Invalid(why) => why.clone(),
        e => e.to_string(),
    })
}

fn or_refused<T>(result: FsResult<T>, reply: impl FnOnce(T) -> CommandReply) -> CommandReply {
    match result {
        Ok(v) => reply(v),
        Err(e) => refused(&e),
    }
}

impl<K: Kv> Ctx<'_, K> {
    fn command(&mut self, command: &Command) -> CommandReply {
        match command {
            Command::Format { cluster, pg_count, incarnation, backed } => {
                done(self.format(*cluster, *pg_count, *incarnation, *backed))
            }
            Command::Client { session, sequence, answered_below, op } => {
                CommandReply::Op(self.client_op(*session, *sequence, *answered_below, op))
            }
            Command::OpenSession { client, label } => {
                CommandReply::Session(self.open_session(*client, label))
            }
            Command::RenewSessions(ids) => done(self.renew_sessions(ids)),
            Command::EndSessions(ids) => done(self.end_sessions(ids)),
            Command::RegisterNode(call) => CommandReply::Node(self.register_node(call)),
            Command::SetNodeState(node, state) => done(self.set_node_state(*node, *state)),
            Command::SetDesired(nodes) => {
                self.set_desired(*nodes);
                CommandReply::Done
            }
            Command::PgMoving(pg, moving) => done(self.pg_moving(*pg, *moving)),
            Command::KeepWindows { pg, from, entries } => {
                done(self.keep_windows(*pg, *from, entries))
            }
            Command::SetPg { pg, from, members } => done(self.set_pg(*pg, *from, members)),
            Command::StandIn { pg, from, members, cut_off } => {
                done(self.stand_in(*pg, *from, members, *cut_off))
            }
            Command::AbandonInodes { node, cut_off, inodes } => {
                done(self.abandon_inodes(*node, *cut_off, inodes))
            }
            Command::RemoveNode { node, cut_off } => done(self.remove_node(*node, *cut_off)),
            Command::SetReplication { replicas, min_in_sync } => {
                done(self.set_replication(*replicas, *min_in_sync))
            }
            Command::AddMember { pg, from, member } => done(self.add_member(*pg, *from, *member)),
            Command::MemberInSync { pg, from, member } => {
                done(self.member_in_sync(*pg, *from, *member))
            }
            Command::DropMember { pg, from, member, planned } => {
                done(self.drop_member(*pg, *from, *member, *planned))
            }
            Command::TakeOver { pg, from, to, keep_old } => {
                done(self.take_over(*pg, *from, *to, *keep_old))
            }
            Command::SetShutdown(down) => {
                self.set_counter(Counter::ShuttingDown, u64::from(*down));
                CommandReply::Done
            }
            Command::FlushBegin { inodes, via_temporary } => {
                or_refused(self.flush_begin(inodes, *via_temporary), CommandReply::Tickets)
            }
            Command::FlushSealed(seals) => {
                or_refused(self.flush_sealed(seals), CommandReply::Plans)
            }
            Command::FlushAbort(inodes) => done(self.flush_abort(inodes)),
            Command::FlushCommit(outcomes) => done(self.flush_commit(outcomes)),
            Command::Fenced(seals) => done(self.fenced(seals)),
            Command::NoticesDone(ids) => done(self.notices_done(ids)),
            Command::KeyBegin(keys) => or_refused(self.key_begin(keys), CommandReply::Keys),
            Command::LookBegin(keys) => or_refused(self.look_begin(keys), CommandReply::Keys),
            Command::KeyDone { nonce, result, .. } => done(self.settle(*nonce, result)),
            Command::KeyDoubt { nonce, valid_ms } => done(self.doubt(*nonce, *valid_ms)),
            Command::Ingest { dir, listed_at, entries, page } => {
                done(self.ingest(*dir, *listed_at, entries, page.as_ref()))
            }
            Command::SetIngestAttrs(found) => done(
                found
                    .iter()
                    .try_for_each(|(inode, etag, attrs)| self.set_found_attrs(*inode, etag, attrs)),
            ),
            Command::Adopt(changes) => {
                done(changes.iter().try_for_each(|a| self.adopt(a).map(|_| ())))
            }
            Command::BaseChanged(found) => {
                done(found.iter().try_for_each(|f| self.base_changed(f)))
            }
            Command::Rescued(rescue) => done(self.rescued(rescue)),
            Command::MoveStep(limit) => done(self.move_step(*limit)),
            Command::Load(step, records) => done(self.load(*step, records)),
            Command::SetLeases(given) => {
                self.set_counter(Counter::Leases, u64::from(*given));
                CommandReply::Done
            }
            Command::Borrow(session) => done(self.borrow(*session)),
            Command::Reap(inodes) => done(self.reap(inodes)),
            Command::Repair(repairs) => done(self.repair_all(repairs)),
        }
    }

    fn format(
        &mut self,
        cluster: ClusterId,
        pg_count: u16,
        incarnation: Incarnation,
        backed: bool,
    ) -> FsResult<()> {
        if self.read().is_formatted()? {
            return Err(FsError::Invalid("the state machine is formatted already".into()));
        }
        self.set_counter(Counter::Formatted, 1);
        self.set_counter(Counter::ClusterHigh, (cluster.0 >> 64) as u64);
        self.set_counter(Counter::ClusterLow, cluster.0 as u64);
        self.set_counter(Counter::Incarnation, u64::from(incarnation.0));
        self.set_counter(Counter::PgCount, u64::from(pg_count));
        // The root's id is 1 in every incarnation.
        self.set_counter(Counter::NextInode, InodeId::ROOT.0);
        let mut root = Inode::new(
            InodeId::ROOT,
            FileKind::Directory,
            (InodeId::ROOT, b""),
            (0o755, 0, 0),
            self.now,
        );
        if backed {
            root.dir = Some(Directory::listing());
        }
        self.save(Loaded::created(root))?;
        self.put_map(&ClusterMap {
            version: MapVersion(1),
            cluster,
            incarnation,
            nodes: Vec::new(),
            pgs: vec![PgEntry::default(); usize::from(pg_count)],
        });
        Ok(())
    }
}
