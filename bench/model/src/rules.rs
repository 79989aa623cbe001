//! The rules of docs/PROTOCOL.md that a checker run can take away, one name each.
//!
//! Every model asks [`Rules::on`] where the rule bites; a negative test removes one rule and demands a
//! counterexample. No rule does anything here: this is only the switchboard.

/// One removable rule. The number in each line is the rule's number in docs/PROTOCOL.md.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Rule {
    /// R1: a grant is committed (the inode is Dirty) before the client may use it.
    GrantBeforeWrite,
    /// R3: no grant of g+1 while g is being sealed.
    NoGrantWhileSealing,
    /// R4: a sealed primary refuses tags ≤ g.
    FloorAtSeal,
    /// R5: a seal goes to every primary below alloc_limit, also to those that hold nothing.
    SealEveryPrimary,
    /// R6: parts are read from what the seal pinned, not from what is newest.
    PinAtSeal,
    /// R7: tags never go back at one primary.
    MonotoneTags,
    /// R8: FlushCommit makes clean only if nothing was granted above g.
    CleanIffNoGrantAbove,
    /// R8: a cut counts as something above g.
    CutCountsAsAbove,
    /// R9: seal answers carry high-water marks, and the size takes them in.
    SealHighWater,
    /// R10: floors are journaled before the seal is answered.
    FloorJournaled,
    /// R10: pins survive a restart.
    PinJournaled,
    /// R10: a write is journaled before it is acked.
    AckAfterJournal,
    /// R11: a cut makes a new generation.
    CutBumpsGeneration,
    /// R11: truncate lowers backing.limit.
    CutLowersLimit,
    /// R12: requests name their view; a primary that is behind takes the cuts first.
    ViewNamed,
    /// R13: a primary that journaled a cut refuses tags ≤ the cut's generation.
    CutRaisesFloor,
    /// R14: truncate answers only when every primary has the cut.
    TruncateWaits,
    /// R15: CommitWrite is clipped by the cuts at or above its generation.
    CommitClippedByCuts,
    /// R16: when a cut retires, no later CommitWrite of its generations moves the size.
    SizeFloorAtRetire,
    /// R17: a cut during a flush also clips the object that this flush commits.
    CutClipsFlush,
    /// R18: an expired session is over only after its generation was sealed.
    ExpirySeals,
    /// R19: a window of (session, sequence) answers duplicates.
    Window,
    /// R19: the window is journaled with the write.
    WindowJournaled,
    /// R19: an answer from the window names the tag the write was taken under.
    WindowTellsTag,
    /// R20: under a new session only what was refused in so many words is sent again.
    ResendOnlyRefused,
    /// R21: reads and writes need a live lease.
    LeaseOnServe,
    /// R22: requests carry the epoch, and unequal epochs are refused.
    EpochEqual,
    /// R22: a client never sends under a map older than its grant's.
    MapNotOlderThanGrant,
    /// R23: a new epoch without the old primary's ack waits lease + drift.
    EpochWaitsForLease,
    /// R24: a group whose only member is out of reach and dirty stays stranded.
    StrandedWaits,
    /// R25: the donor freezes before its dirt is flushed for a hand-over.
    FreezeBeforeDrain,
    /// R25: the freeze survives a restart.
    FreezeJournaled,
    /// R25: the epoch is committed only at dirty = pins = 0.
    DrainedBeforeEpoch,
    /// R26: a new primary refuses grants older than its since_map_version.
    SinceMapVersion,
    /// R27: the (session, sequence) window moves with its group.
    WindowMoves,
    /// R28: the nonce is logged before the request leaves.
    NonceLoggedFirst,
    /// R29: PUT carries the condition its key state expects.
    PutCondition,
    /// R29: DELETE carries the condition too.
    DeleteCondition,
    /// R30: one mutation in flight per key.
    OneMutation,
    /// R31: a lost reply is looked up, never taken for success.
    LostReplyNotSuccess,
    /// R31: a 412 is looked up before the object is called foreign.
    LookUpBeforeForeign,
    /// R31: what a look-up finds is credited to the attempt of its nonce, not to the current one.
    AdoptByAttempt,
    /// R32: nothing found is not the same as nothing coming: wait until the attempt is fenced or void.
    WaitValidity,
    /// R33: no work makes the condition of an unanswered attempt true again.
    ConditionMayRecur,
    /// R41: a member applies a primary's mutations in the primary's order.
    OneOrder,
    /// R41: a newer stream of a primary ends the older one before anything of it is taken.
    OneStream,
    /// R41: a member takes what the stream says, without asking its own window or floor.
    MemberTakesBlindly,
    /// R41: a member acks what is durable there.
    MemberAcksDurable,
    /// R42: the primary answers a mutation only when every in-sync member acked it.
    AckWaitsInSync,
    /// R42: also when those acked it that it asked to be made in-sync.
    AckWaitsAsked,
    /// R47: it waits for a member from the end mark on, not only from when it asks.
    WaitFromEndMark,
    /// R42: an answer from the window waits until all of those hold the chunk.
    WindowAnswerWaits,
    /// R42: a read waits until all of those hold the chunk.
    ReadWaits,
    /// R42: with fewer in-sync members than min_in_sync nothing is acked.
    MinInSyncToAck,
    /// R43: the primary acks without a member only once it knows the epoch without it.
    DropKnownFirst,
    /// R43: the last in-sync member in contact is never dropped.
    LastInSyncStays,
    /// R43, R47: a command names the epoch it was made for, and another one refuses it.
    CommandNamesEpoch,
    /// R44: a syncing member never takes over.
    TakeoverInSync,
    /// R44: a takeover waits for the old primary's lease + drift.
    TakeoverWaitsForLease,
    /// R45: a member refuses epochs older than the newest it knows.
    FenceOldEpoch,
    /// R45: a restarted member takes nothing before it has a map from the metadata plane.
    RestartedKnowsNone,
    /// R45: with a mutation of a newer epoch a member knows that epoch.
    EpochFromStream,
    /// R45: the restart of a primary that has other members is a new epoch.
    RestartIsNewEpoch,
    /// R46: a stream after a new primary, a restart or a break begins with an alignment.
    AlignEachStream,
    /// R46: a chunk's writes are held while it is read and sent.
    ChunkHeld,
    /// R46: a chunk's window entries go with its bytes, in one record.
    WindowWithChunk,
    /// R46: the member's entries are replaced, not merged.
    WindowReplaced,
    /// R46: at the end mark goes what was not named.
    EndMarkDrops,
    /// R47: in-sync is asked for only after the end mark was acked.
    AskAfterEndMark,
    /// R48: who leaves, leaves at least min_in_sync in-sync members.
    ShrinkKeepsMin,
}

impl Rule {
    /// Every rule that can be taken out.
    pub const ALL: [Rule; 70] = [
        Rule::GrantBeforeWrite,
        Rule::NoGrantWhileSealing,
        Rule::FloorAtSeal,
        Rule::SealEveryPrimary,
        Rule::PinAtSeal,
        Rule::MonotoneTags,
        Rule::CleanIffNoGrantAbove,
        Rule::CutCountsAsAbove,
        Rule::SealHighWater,
        Rule::FloorJournaled,
        Rule::PinJournaled,
        Rule::AckAfterJournal,
        Rule::CutBumpsGeneration,
        Rule::CutLowersLimit,
        Rule::ViewNamed,
        Rule::CutRaisesFloor,
        Rule::TruncateWaits,
        Rule::CommitClippedByCuts,
        Rule::SizeFloorAtRetire,
        Rule::CutClipsFlush,
        Rule::ExpirySeals,
        Rule::Window,
        Rule::WindowJournaled,
        Rule::WindowTellsTag,
        Rule::ResendOnlyRefused,
        Rule::LeaseOnServe,
        Rule::EpochEqual,
        Rule::MapNotOlderThanGrant,
        Rule::EpochWaitsForLease,
        Rule::StrandedWaits,
        Rule::FreezeBeforeDrain,
        Rule::FreezeJournaled,
        Rule::DrainedBeforeEpoch,
        Rule::SinceMapVersion,
        Rule::WindowMoves,
        Rule::NonceLoggedFirst,
        Rule::PutCondition,
        Rule::DeleteCondition,
        Rule::OneMutation,
        Rule::LostReplyNotSuccess,
        Rule::LookUpBeforeForeign,
        Rule::AdoptByAttempt,
        Rule::WaitValidity,
        Rule::ConditionMayRecur,
        Rule::OneOrder,
        Rule::OneStream,
        Rule::MemberTakesBlindly,
        Rule::MemberAcksDurable,
        Rule::AckWaitsInSync,
        Rule::AckWaitsAsked,
        Rule::WaitFromEndMark,
        Rule::WindowAnswerWaits,
        Rule::ReadWaits,
        Rule::MinInSyncToAck,
        Rule::DropKnownFirst,
        Rule::LastInSyncStays,
        Rule::CommandNamesEpoch,
        Rule::TakeoverInSync,
        Rule::TakeoverWaitsForLease,
        Rule::FenceOldEpoch,
        Rule::RestartedKnowsNone,
        Rule::EpochFromStream,
        Rule::RestartIsNewEpoch,
        Rule::AlignEachStream,
        Rule::ChunkHeld,
        Rule::WindowWithChunk,
        Rule::WindowReplaced,
        Rule::EndMarkDrops,
        Rule::AskAfterEndMark,
        Rule::ShrinkKeepsMin,
    ];
}

/// Which rules are in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rules(u128);

impl Rules {
    /// All rules of the protocol.
    pub const ALL: Rules = Rules(u128::MAX);

    /// These rules less `removed`.
    #[must_use]
    pub fn without(self, removed: &[Rule]) -> Rules {
        Rules(removed.iter().fold(self.0, |bits, r| bits & !(1 << (*r as u8))))
    }

    /// Whether `rule` is in force.
    #[must_use]
    pub fn on(self, rule: Rule) -> bool {
        self.0 & (1 << (rule as u8)) != 0
    }
}
