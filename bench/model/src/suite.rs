//! The configurations that are checked to the end, and which of them must break when a rule is taken out.
//!
//! The sizes are the smallest in which every `sometimes` property is met and every removal is caught.

use crate::core::Core;
use crate::handover::Handover;
use crate::key::Key;
use crate::replica::Replica;
use crate::rules::{Rule, Rules};
use crate::run::{Outcome, check};

/// One bounded model.
#[derive(Clone, Debug)]
pub enum Bounded {
    Core(Core),
    Handover(Handover),
    Key(Key),
    Replica(Replica),
}

impl Bounded {
    /// Checks it under `rules`; see [`check`].
    pub fn run(&self, rules: Rules, stop_at_failure: bool) -> Outcome {
        match self.clone() {
            Bounded::Core(m) => check(Core { rules, ..m }, stop_at_failure),
            Bounded::Handover(m) => check(Handover { rules, ..m }, stop_at_failure),
            Bounded::Key(m) => check(Key { rules, ..m }, stop_at_failure),
            Bounded::Replica(m) => check(Replica { rules, ..m }, stop_at_failure),
        }
    }
}

/// The configurations, by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Config {
    /// Two flushes, one abort, a leader crash.
    Flush,
    /// Two clients write twice and once while one generation is flushed.
    Writers,
    /// One truncate to half against two writers and a flush.
    Cut,
    /// Two truncates and a flush.
    CutTwice,
    /// A truncate against repeated and unanswered writes and an aborted flush.
    CutRetry,
    /// A truncate while a session expires.
    CutFence,
    /// A session expires while its client lives, with a duplicate or lost reply.
    Fence,
    /// Planned hand-over with late and repeated requests.
    Move,
    /// There and back again.
    MoveBack,
    /// The old primary is cut off, and somebody stands in.
    StandIn,
    /// A primary and a backup: takeovers there and back, a broken stream.
    Pair,
    /// The same with a crash of either.
    PairRestart,
    /// Three replicas, of which one is lost.
    Trio,
    /// The same with a crash.
    TrioRestart,
    /// A second node joins a lone primary, and takes over.
    Join,
    /// The primary of a joining node crashes.
    JoinRestart,
    /// A member is dropped and comes back with what it had.
    Rejoin,
    /// The same while commands linger.
    RejoinLate,
    /// Two copies are demanded; nodes leave by plan, and one is lost.
    Shrink,
    /// A key that holds our object: flush, unlink, re-create, a stranger.
    KeyOld,
    /// A key that holds nothing.
    KeyNew,
}

/// Members of a group at the start, and its mutations, as [`Replica`] takes them.
const LONE: u8 = 0b001;
const PAIR: u8 = 0b011;
const TRIO: u8 = 0b111;
const ONE_WRITE: u8 = 0b001;
const WRITES: u8 = 0b011;
const WRITE_AND_CUT: u8 = 0b101;

impl Config {
    pub const ALL: [Config; 21] = [
        Config::Flush,
        Config::Writers,
        Config::Cut,
        Config::CutTwice,
        Config::CutRetry,
        Config::CutFence,
        Config::Fence,
        Config::Move,
        Config::MoveBack,
        Config::StandIn,
        Config::Pair,
        Config::PairRestart,
        Config::Trio,
        Config::TrioRestart,
        Config::Join,
        Config::JoinRestart,
        Config::Rejoin,
        Config::RejoinLate,
        Config::Shrink,
        Config::KeyOld,
        Config::KeyNew,
    ];

    /// The model of this configuration, with all rules.
    pub fn bounded(self) -> Bounded {
        let core = Core {
            rules: Rules::ALL,
            script: [&[1], &[1]],
            flushes: 1,
            aborts: 0,
            truncates: &[],
            expiries: 0,
            node_restarts: 1,
            leader_crashes: 0,
            dups: 0,
        };
        let group = Handover {
            rules: Rules::ALL,
            script: [1, 1],
            flushes: 1,
            moves: 1,
            partitions: 0,
            node_restarts: 1,
            dups: 1,
        };
        let key = Key {
            rules: Rules::ALL,
            exists: true,
            generations: 3,
            attempts: 5,
            unlinks: 1,
            foreign_puts: 1,
            leader_crashes: 1,
        };
        let pair = Replica {
            rules: Rules::ALL,
            members: PAIR,
            ops: WRITES,
            min_in_sync: 1,
            takeovers: 1,
            drops: 0,
            adds: 0,
            leaves: 0,
            losses: 0,
            restarts: 0,
            breaks: 0,
            reads: 1,
        };
        let trio = Replica { members: TRIO, ..pair.clone() };
        let lone = Replica { members: LONE, adds: 1, ..pair.clone() };
        match self {
            Config::Flush => Bounded::Core(Core {
                script: [&[0], &[1]],
                flushes: 2,
                aborts: 1,
                leader_crashes: 1,
                dups: 1,
                ..core
            }),
            Config::Writers => {
                Bounded::Core(Core { script: [&[0, 1], &[1]], flushes: 2, aborts: 1, ..core })
            }
            Config::Cut => Bounded::Core(Core { truncates: &[1], flushes: 2, ..core }),
            Config::CutTwice => {
                Bounded::Core(Core { script: [&[0], &[1]], truncates: &[0, 2], ..core })
            }
            Config::CutRetry => Bounded::Core(Core { truncates: &[1], dups: 1, aborts: 1, ..core }),
            Config::CutFence => Bounded::Core(Core { truncates: &[1], expiries: 1, ..core }),
            Config::Fence => Bounded::Core(Core { expiries: 1, dups: 1, ..core }),
            Config::Move => Bounded::Handover(group),
            Config::MoveBack => Bounded::Handover(Handover { moves: 2, dups: 0, ..group }),
            Config::StandIn => Bounded::Handover(Handover { partitions: 1, dups: 1, ..group }),
            Config::Pair => Bounded::Replica(Replica { takeovers: 2, breaks: 1, ..pair }),
            Config::PairRestart => Bounded::Replica(Replica { restarts: 1, ..pair }),
            Config::Trio => Bounded::Replica(Replica { losses: 1, ..trio }),
            Config::TrioRestart => {
                Bounded::Replica(Replica { ops: ONE_WRITE, restarts: 1, reads: 0, ..trio })
            }
            Config::Join => Bounded::Replica(Replica { takeovers: 2, ..lone }),
            Config::JoinRestart => {
                Bounded::Replica(Replica { ops: ONE_WRITE, restarts: 1, ..lone })
            }
            Config::Rejoin => Bounded::Replica(Replica {
                ops: WRITE_AND_CUT,
                takeovers: 0,
                drops: 1,
                adds: 1,
                ..pair
            }),
            Config::RejoinLate => Bounded::Replica(Replica {
                ops: ONE_WRITE,
                takeovers: 0,
                drops: 1,
                adds: 2,
                ..lone
            }),
            Config::Shrink => Bounded::Replica(Replica {
                ops: ONE_WRITE,
                min_in_sync: 2,
                leaves: 2,
                losses: 1,
                ..trio
            }),
            Config::KeyOld => Bounded::Key(key),
            Config::KeyNew => Bounded::Key(Key { exists: false, ..key }),
        }
    }
}

/// Rules taken out, and a configuration in which that must be seen.
#[derive(Clone, Copy, Debug)]
pub struct Removal {
    pub rules: &'static [Rule],
    pub config: Config,
}

macro_rules! removals {
    ($($config:ident: $([$($rule:ident),+])+;)+) => {
        /// Every removal that must be caught.
        pub const REMOVALS: &[Removal] = &[$($(
            Removal { rules: &[$(Rule::$rule),+], config: Config::$config },
        )+)+];
    };
}

removals! {
    Flush: [GrantBeforeWrite] [NoGrantWhileSealing] [FloorAtSeal] [SealEveryPrimary]
        [CleanIffNoGrantAbove] [FloorJournaled] [PinJournaled] [AckAfterJournal];
    Writers: [PinAtSeal] [MonotoneTags];
    Cut: [CutCountsAsAbove] [CutBumpsGeneration] [CutLowersLimit] [ViewNamed] [CutRaisesFloor]
        [TruncateWaits] [CommitClippedByCuts] [SizeFloorAtRetire] [CutClipsFlush];
    CutTwice: [SealHighWater];
    CutRetry: [WindowTellsTag];
    Fence: [ExpirySeals] [Window] [WindowJournaled] [ResendOnlyRefused];
    Move: [FreezeBeforeDrain] [FreezeJournaled] [DrainedBeforeEpoch] [SinceMapVersion] [WindowMoves];
    StandIn: [LeaseOnServe] [EpochWaitsForLease] [StrandedWaits] [SinceMapVersion]
        [EpochEqual, LeaseOnServe] [MapNotOlderThanGrant, LeaseOnServe];
    Pair: [OneOrder] [OneStream] [AckWaitsInSync] [ReadWaits] [DropKnownFirst]
        [TakeoverWaitsForLease] [LeaseOnServe] [AlignEachStream] [WindowWithChunk] [WindowReplaced];
    PairRestart: [MemberAcksDurable] [WindowAnswerWaits];
    Trio: [FenceOldEpoch] [EpochFromStream];
    TrioRestart: [RestartedKnowsNone];
    Join: [AckWaitsAsked] [WaitFromEndMark] [TakeoverInSync] [ChunkHeld] [AskAfterEndMark];
    JoinRestart: [RestartIsNewEpoch];
    Rejoin: [EndMarkDrops];
    RejoinLate: [LastInSyncStays] [CommandNamesEpoch];
    Shrink: [MinInSyncToAck] [ShrinkKeepsMin];
    KeyOld: [PutCondition] [DeleteCondition] [OneMutation] [LostReplyNotSuccess] [LookUpBeforeForeign]
        [AdoptByAttempt] [NonceLoggedFirst] [ConditionMayRecur];
    KeyNew: [ConditionMayRecur] [WaitValidity];
}

/// Second lines: without one of these alone the model still holds, because the lease or the grant's map
/// version stops the same runs; together with the lease they are in [`REMOVALS`].
pub const SECOND_LINES: &[Removal] = &[
    Removal { rules: &[Rule::EpochEqual], config: Config::Move },
    Removal { rules: &[Rule::MapNotOlderThanGrant], config: Config::Move },
    Removal { rules: &[Rule::MemberTakesBlindly], config: Config::Pair },
];
