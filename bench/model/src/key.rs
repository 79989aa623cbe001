//! One key in S3: conditional PUT and DELETE, lost and delayed requests, nonces, look-ups (I3, I6, I7).
//!
//! A request that the leader gave up on stays in the network and may still land, also after the leader
//! crashed. Etags are of the content, as in S3, and every other generation has the same content: a
//! condition that failed once can hold again. Not here: multipart, copies, several names.

use stateright::{Model, Property};

use crate::rules::{Rule, Rules};

const FOREIGN: u8 = 0;
const FOREIGN_ETAG: u8 = 99;

/// As S3's MD5: equal content, equal etag.
fn etag_of(generation: u8) -> u8 {
    10 + generation % 2
}

/// One bounded configuration.
#[derive(Clone, Debug)]
pub struct Key {
    pub rules: Rules,
    /// Whether the key holds our own object of generation 0 at the start.
    pub exists: bool,
    /// Generations to flush.
    pub generations: u8,
    /// Attempts in all: PUT and DELETE.
    pub attempts: u8,
    pub unlinks: u8,
    pub foreign_puts: u8,
    pub leader_crashes: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Object {
    etag: u8,
    nonce: u8,
    generation: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Condition {
    None,
    Absent,
    Etag(u8),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Work {
    Put(u8),
    Delete,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Request {
    nonce: u8,
    work: Work,
    condition: Condition,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Reply {
    nonce: u8,
    /// The new etag (0: deleted), or a failed condition.
    result: Option<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Stand {
    Settled,
    InFlight,
    /// No reply; it may have landed, or may still.
    Ambiguous,
    /// Condition failed; look before judging.
    Refused,
    /// No reply, and nothing of it can land any more.
    Void,
}

/// A state; the last block is the observer's.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    object: Option<Object>,
    net: Vec<Request>,
    replies: Vec<Reply>,
    expected: Condition,
    /// Nonces in the log: (nonce, work).
    logged: Vec<(u8, Work)>,
    /// The leader's memory of the attempt in flight.
    attempt: Option<(u8, Work)>,
    /// Given up unanswered, and perhaps still under way.
    dangling: Vec<(u8, Condition)>,
    /// The nonce of the object that `expected` names.
    holds: u8,
    stand: Stand,
    /// The condition of the attempt in flight.
    sent_under: Condition,
    linked: bool,
    gone: bool,
    conflict: bool,
    want: u8,
    clean: u8,
    next_nonce: u8,
    generations: u8,
    unlinks: u8,
    foreign_puts: u8,
    leader_crashes: u8,
    foreign: bool,
    foreign_lost: bool,
    recreated: bool,
    adopted: bool,
}

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Dirty,
    Unlink,
    Recreate,
    Start,
    Retry,
    Execute(u8),
    ExecuteReplyLost(u8),
    Reply(u8),
    TimeOut,
    LookUp,
    ValidityPassed,
    LeaderCrash,
    ForeignPut,
}

impl Key {
    fn on(&self, rule: Rule) -> bool {
        self.rules.on(rule)
    }

    fn work(s: &State) -> Option<Work> {
        if s.conflict {
            None
        } else if s.linked {
            (s.want > s.clean).then_some(Work::Put(s.want))
        } else {
            (!s.gone).then_some(Work::Delete)
        }
    }

    fn send(&self, s: &mut State, work: Work) -> Option<()> {
        if s.next_nonce > self.attempts {
            return None;
        }
        let nonce = s.next_nonce;
        s.next_nonce += 1;
        let guarded = match work {
            Work::Put(_) => self.on(Rule::PutCondition),
            Work::Delete => self.on(Rule::DeleteCondition),
        };
        let condition = if guarded { s.expected } else { Condition::None };
        if self.on(Rule::NonceLoggedFirst) {
            s.logged.push((nonce, work));
        }
        s.attempt = Some((nonce, work));
        s.sent_under = condition;
        s.stand = Stand::InFlight;
        s.net.push(Request { nonce, work, condition });
        s.net.sort_unstable();
        Some(())
    }

    fn done(&self, s: &mut State, work: Work) {
        match work {
            Work::Put(g) => {
                s.expected = Condition::Etag(etag_of(g));
                s.clean = s.clean.max(g);
                s.gone = false;
            }
            Work::Delete => {
                s.expected = Condition::Absent;
                s.gone = true;
                // A re-created name's data is still to be written, whatever the old one had.
            }
        }
    }

    fn execute(&self, s: &mut State, i: usize, reply_lost: bool) {
        let r = s.net.remove(i);
        let holds = match r.condition {
            Condition::None => true,
            Condition::Absent => s.object.is_none(),
            Condition::Etag(e) => {
                s.object.is_some_and(|o| o.etag == e)
                    || (r.work == Work::Delete && s.object.is_none())
            }
        };
        let mut result = None;
        if holds {
            s.foreign_lost |= s.object.is_some_and(|o| o.nonce == FOREIGN);
            match r.work {
                Work::Put(generation) => {
                    let etag = etag_of(generation);
                    s.object = Some(Object { etag, nonce: r.nonce, generation });
                    result = Some(etag);
                }
                Work::Delete => {
                    s.object = None;
                    result = Some(0);
                }
            }
        }
        if !reply_lost && s.attempt.is_some_and(|a| a.0 == r.nonce) {
            s.replies.push(Reply { nonce: r.nonce, result });
        }
    }

    fn look_up(&self, s: &mut State) -> Option<()> {
        if !matches!(s.stand, Stand::Ambiguous | Stand::Refused | Stand::Void) {
            return None;
        }
        let (nonce, work) = s.attempt?;
        let condition = s.sent_under;
        let over = s.stand != Stand::Ambiguous || !self.on(Rule::WaitValidity);
        match s.object {
            Some(o) => match s.logged.iter().find(|l| l.0 == o.nonce).copied() {
                Some((found, made)) => {
                    let credit = if self.on(Rule::AdoptByAttempt) { made } else { work };
                    let news = s.holds != found;
                    if news {
                        s.adopted = true;
                        s.holds = found;
                        s.dangling.retain(|d| d.0 != found);
                        self.done(s, credit);
                    }
                    if !(found == nonce || over || news) {
                        return None;
                    }
                    if found != nonce && s.stand == Stand::Ambiguous {
                        s.dangling.push((nonce, condition));
                    }
                }
                None => s.conflict = true,
            },
            None if work == Work::Delete => {
                // Some DELETE of ours landed, or a stranger's; this one may still be under way.
                if s.stand == Stand::Ambiguous {
                    s.dangling.push((nonce, condition));
                }
                self.done(s, Work::Delete);
            }
            None if over => {}
            None => return None,
        }
        s.attempt = None;
        s.stand = Stand::Settled;
        Some(())
    }

    fn step(&self, s: &mut State, action: Action) -> Option<()> {
        match action {
            Action::Dirty => {
                if !s.linked {
                    return None;
                }
                s.generations -= 1;
                s.want += 1;
            }
            Action::Unlink => {
                if !s.linked || s.conflict {
                    return None;
                }
                s.unlinks -= 1;
                s.linked = false;
                s.gone = false;
            }
            Action::Recreate => {
                if s.linked || s.generations == 0 {
                    return None;
                }
                s.generations -= 1;
                s.linked = true;
                s.recreated = true;
                s.want += 1;
            }
            Action::Start => {
                let work = Self::work(s)?;
                if s.stand != Stand::Settled && self.on(Rule::OneMutation) {
                    return None;
                }
                let recurs = match work {
                    Work::Put(g) => Condition::Etag(etag_of(g)),
                    Work::Delete => Condition::Absent,
                };
                let dangling = s.dangling.iter().any(|d| d.1 == recurs);
                if dangling && self.on(Rule::ConditionMayRecur) {
                    return None;
                }
                if work == Work::Delete && s.expected == Condition::Absent {
                    self.done(s, Work::Delete);
                } else {
                    self.send(s, work)?;
                }
            }
            Action::Retry => {
                // The same work under the same condition: at most one of the two can land.
                let (nonce, work) = s.attempt?;
                if s.stand != Stand::Ambiguous {
                    return None;
                }
                s.dangling.push((nonce, s.sent_under));
                self.send(s, work)?;
            }
            Action::Execute(i) => self.execute(s, usize::from(i), false),
            Action::ExecuteReplyLost(i) => self.execute(s, usize::from(i), true),
            Action::Reply(i) => {
                let r = s.replies.remove(usize::from(i));
                let (nonce, work) = s.attempt?;
                if r.nonce != nonce || s.stand != Stand::InFlight {
                    return Some(());
                }
                match r.result {
                    Some(_) => {
                        s.logged.retain(|l| l.0 != nonce);
                        s.logged.push((nonce, work));
                        s.holds = nonce;
                        self.done(s, work);
                        s.attempt = None;
                        s.stand = Stand::Settled;
                    }
                    None if self.on(Rule::LookUpBeforeForeign) => s.stand = Stand::Refused,
                    None => {
                        s.conflict = true;
                        s.attempt = None;
                        s.stand = Stand::Settled;
                    }
                }
            }
            Action::TimeOut => {
                let (_, work) = s.attempt?;
                if s.stand != Stand::InFlight {
                    return None;
                }
                s.replies.clear();
                s.stand = Stand::Ambiguous;
                if !self.on(Rule::LostReplyNotSuccess) {
                    self.done(s, work);
                    s.attempt = None;
                    s.stand = Stand::Settled;
                }
            }
            Action::LookUp => self.look_up(s)?,
            Action::ValidityPassed => {
                let mut void: Vec<u8> = s.dangling.drain(..).map(|d| d.0).collect();
                if let (Stand::Ambiguous, Some((nonce, _))) = (s.stand, s.attempt) {
                    void.push(nonce);
                    s.stand = Stand::Void;
                }
                s.net.retain(|r| !void.contains(&r.nonce));
            }
            Action::LeaderCrash => {
                s.leader_crashes -= 1;
                s.replies.clear();
                if s.stand != Stand::Settled {
                    s.stand = Stand::Ambiguous;
                }
                if !self.on(Rule::NonceLoggedFirst) {
                    s.attempt = None;
                    s.stand = Stand::Settled;
                }
            }
            Action::ForeignPut => {
                s.foreign_puts -= 1;
                s.foreign = true;
                s.object = Some(Object { etag: FOREIGN_ETAG, nonce: FOREIGN, generation: 99 });
            }
        }
        Some(())
    }
}

impl Model for Key {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let own = Object { etag: etag_of(0), nonce: 1, generation: 0 };
        vec![State {
            object: self.exists.then_some(own),
            net: Vec::new(),
            replies: Vec::new(),
            expected: if self.exists { Condition::Etag(etag_of(0)) } else { Condition::Absent },
            logged: if self.exists { vec![(1, Work::Put(0))] } else { Vec::new() },
            attempt: None,
            dangling: Vec::new(),
            holds: u8::from(self.exists),
            stand: Stand::Settled,
            sent_under: Condition::None,
            linked: true,
            gone: !self.exists,
            conflict: false,
            want: 0,
            clean: 0,
            next_nonce: 2,
            generations: self.generations,
            unlinks: self.unlinks,
            foreign_puts: self.foreign_puts,
            leader_crashes: self.leader_crashes,
            foreign: false,
            foreign_lost: false,
            recreated: false,
            adopted: false,
        }]
    }

    fn actions(&self, s: &State, out: &mut Vec<Action>) {
        if s.generations > 0 {
            out.extend([Action::Dirty, Action::Recreate]);
        }
        if s.unlinks > 0 {
            out.push(Action::Unlink);
        }
        for i in 0..s.net.len() as u8 {
            out.extend([Action::Execute(i), Action::ExecuteReplyLost(i)]);
        }
        for i in 0..s.replies.len() as u8 {
            out.push(Action::Reply(i));
        }
        out.extend([
            Action::Start,
            Action::Retry,
            Action::TimeOut,
            Action::LookUp,
            Action::ValidityPassed,
        ]);
        if s.leader_crashes > 0 {
            out.push(Action::LeaderCrash);
        }
        if s.foreign_puts > 0 {
            out.push(Action::ForeignPut);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut s = last.clone();
        self.step(&mut s, action)?;
        (s != *last).then_some(s)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut all = vec![
            Property::<Self>::always("I3 clean is in S3", |_, s| {
                let settled = s.linked && s.want == s.clean && s.want > 0;
                !settled || s.foreign || s.object.is_some_and(|o| o.generation == s.want)
            }),
            Property::<Self>::always("I6 deleted stays deleted", |_, s| {
                s.linked || !s.gone || s.foreign || s.object.is_none()
            }),
            Property::<Self>::always("a stranger's object is kept", |_, s| !s.foreign_lost),
            Property::<Self>::always("ours is never taken for foreign", |_, s| {
                !s.conflict || s.foreign
            }),
            Property::<Self>::sometimes("a lost reply is adopted", |_, s| s.adopted),
            Property::<Self>::sometimes("clean at the last generation", |m, s| {
                s.linked && s.clean == m.generations && s.stand == Stand::Settled
            }),
        ];
        if self.foreign_puts > 0 {
            all.push(Property::<Self>::sometimes("a conflict is seen", |_, s| s.conflict));
        }
        if self.unlinks > 0 {
            all.push(Property::<Self>::sometimes("deleted, re-created and clean", |_, s| {
                s.recreated && s.linked && s.want == s.clean
            }));
        }
        all
    }
}
