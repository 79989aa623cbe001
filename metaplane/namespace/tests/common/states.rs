//! States as a check and a dump have them.

use super::*;

/// What a check of a state finds.
pub fn check(kv: &MemKv) -> Vec<Finding> {
    let (mut check, mut findings) = (Check::new(), Vec::new());
    while check.step(Reader(kv), &mut |f| findings.push(f)).expect("readable") {}
    findings
}

/// A state as a dump has it, in pages of a size.
pub fn dump(kv: &MemKv, page: usize) -> Vec<Record> {
    let r = Reader(kv);
    let mut walk = Walk::below(InodeId::ROOT);
    let mut records = vec![r.dump_root().expect("a root")];
    while !walk.is_done() {
        records.extend(r.dump_page(&mut walk, page).expect("readable"));
    }
    records
}

/// A new cluster's state with a dump in it.
pub fn load(records: &[Record], page: usize) -> (MemKv, Vec<CommandReply>) {
    let (cluster, incarnation) = (ClusterId(8), Incarnation(2));
    let format = Command::Format { cluster, pg_count: 64, incarnation, backed: true };
    let pages = records.chunks(page).map(|p| Command::Load(LoadStep::Records, p.to_vec()));
    let steps = [format, Command::Load(LoadStep::Begin, Vec::new())].into_iter();
    let commands: Vec<Command> =
        steps.chain(pages).chain([Command::Load(LoadStep::End, Vec::new())]).collect();
    let (mut kv, mut replies) = (MemKv::default(), Vec::new());
    for command in commands {
        replies.extend(Machine::apply(
            &mut kv,
            &LogEntry { now: Time(1 << 50), commands: vec![command] },
        ));
    }
    (kv, replies)
}
