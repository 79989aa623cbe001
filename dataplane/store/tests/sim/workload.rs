//! What the workload does: writes, flushes, truncates, reads, fills, freezes, drops; each with the model's
//! view of what must come out.

use super::driver::*;
use super::model::{Block, Op, block_start};
use super::oracle::{CHUNKS, Check, Object, ensure, read_piece, scopes};
use ebb_dataplane_protocol::control::FlushDone;
use ebb_dataplane_protocol::*;
use ebb_store::*;
use rand::Rng;
use std::collections::BTreeMap;

impl World {
    // --- views --------------------------------------------------------------------------------------

    /// Presents the file's view; true: it is durable (or nothing is known of the inode).
    pub fn present(&mut self, f: usize) -> Result<bool, String> {
        let mut all = true;
        for scope in scopes(self.files[f].inode) {
            all &= self.present_in(f, scope)?;
        }
        Ok(all)
    }

    fn present_in(&mut self, f: usize, scope: Scope) -> Result<bool, String> {
        let file = &self.files[f];
        let version = file.version;
        let (known, durable) = self.store.view_version(scope);
        if known >= version {
            return Ok(durable);
        }
        let view = ViewUpdate {
            scope,
            version,
            base: BaseView { content: file.content, valid_bytes: file.valid },
            cuts: file.cuts.clone(),
        };
        match self.store.apply_view(&view) {
            Ok(Some(t)) => {
                self.logged(t, Op::View(view));
                Ok(false)
            }
            Ok(None) => Ok(true),
            Err(ControlError::Wait(_)) => Ok(false),
            Err(e) => Err(format!("apply_view: {e}")),
        }
    }

    pub fn logged(&mut self, ticket: Ticket, op: Op) {
        self.head.apply(&op);
        self.log.push_back((ticket, op));
    }

    pub fn control(
        &mut self,
        r: Result<Option<Ticket>, ControlError>,
        op: Op,
    ) -> Result<Option<Ticket>, String> {
        match r {
            Ok(Some(t)) => {
                self.logged(t, op);
                Ok(Some(t))
            }
            Ok(None) | Err(ControlError::Wait(_)) => Ok(None),
            Err(e) => Err(format!("{op:?}: {e}")),
        }
    }

    /// The oldest view that a scope of the inode knows.
    fn least_view(&self, inode: InodeId) -> ViewVersion {
        scopes(inode).into_iter().map(|s| self.store.view_version(s).0).min().unwrap_or_default()
    }

    /// Least tag of a scope that may write, by the model.
    fn least(&self, scope: Scope) -> Generation {
        let Some(i) = self.head.inodes.get(&scope) else { return Generation(0) };
        if self.rule == Break::TagsGoBack { i.floor } else { i.least() }
    }

    // --- writes -------------------------------------------------------------------------------------

    pub fn begin_write(&mut self) -> Check {
        let f = self.rng.random_range(0..self.files.len());
        self.present(f)?;
        let version = self.least_view(self.files[f].inode);
        if version < self.files[f].version && !self.files[f].cuts.is_empty() {
            return Ok(());
        }
        let file = &self.files[f];
        let base = BaseView { content: file.content, valid_bytes: file.valid };
        let (inode, current) = (file.inode, file.generation);
        let stale = self.rng.random_bool(0.08) && current.0 > 0;
        let generation = if stale { Generation(current.0 - 1) } else { current };
        let chunk = CHUNKS[self.rng.random_range(0..CHUNKS.len())];
        let kinds = match self.rule {
            // Inline only: no data sync comes to the rescue.
            Break::SuperblocksUnordered => 4..8,
            _ if self.heavy => 3..13,
            _ => 0..10,
        };
        let len = match self.rng.random_range(kinds) {
            0..4 => self.rng.random_range(1..5000),
            4..6 => 4096 * self.rng.random_range(1..9),
            6..8 => self.rng.random_range(1..=INLINE_BYTES_MAX),
            8 => self.rng.random_range(INLINE_BYTES_MAX..200_000),
            _ => 4096 * self.rng.random_range(9..200),
        };
        let reach = [40_000, 400_000, CHUNK_BYTES][self.rng.random_range(0..3)];
        let mut offset = self.rng.random_range(0..reach.max(len + 1) - len);
        if self.rng.random_bool(0.4) {
            offset = offset / 4096 * 4096;
        }
        let c = self.rng.random_range(0..self.clients.len());
        let session = SessionId(c as u64 + 1);
        let client = &mut self.clients[c];
        let sequence = match self.rng.random_range(0..10) {
            0..4 if !client.retry.is_empty() => client.retry[0],
            0 => self.rng.random_range(1..=client.next),
            _ => client.next,
        };
        let below = client.open.first().copied().unwrap_or(client.next).min(client.next);
        let op = WriteOp {
            inode,
            chunk: ChunkIndex(chunk),
            offset,
            len,
            generation,
            session,
            sequence: Sequence(sequence),
            answered_below: Sequence(below.min(sequence)),
            base,
        };
        let floor = self.least(Scope::of(inode, ChunkIndex(chunk), PGS));
        let pg = PgId::of_chunk(inode, op.chunk, PGS).0;
        let plan = match self.store.begin_write(&op) {
            Ok(plan) => plan,
            Err(e) => {
                self.counts.refused += 1;
                match e {
                    WriteError::Duplicate { generation: said } => {
                        let credited =
                            if self.rule == Break::CreditRetry { generation } else { said };
                        let known = self.durable.seen(session, sequence);
                        ensure(known == Seen::Applied(credited), || {
                            format!("answered as done under {credited}: {known:?}")
                        })?;
                        self.counts.duplicates += 1;
                        self.clients[c].retry.retain(|s| *s != sequence);
                        self.clients[c].open.remove(&sequence);
                    }
                    WriteError::Answered => {
                        let known = self.durable.seen(session, sequence);
                        ensure(known == Seen::Answered, || format!("answered? {known:?}"))?;
                        self.clients[c].retry.retain(|s| *s != sequence);
                        self.clients[c].open.remove(&sequence);
                    }
                    WriteError::StaleGeneration { floor: said } => {
                        ensure(said == floor && generation < floor, || "wrong floor".into())?;
                    }
                    WriteError::Frozen { .. } => {
                        ensure(self.head.frozen.contains_key(&pg), || "not frozen".into())?;
                    }
                    WriteError::NoSpace { evictable, .. } => {
                        self.counts.no_space += 1;
                        if evictable > 0 {
                            self.evict()?;
                        }
                    }
                    WriteError::Wait(_) => {}
                    other => return Err(format!("begin_write: {other}")),
                }
                return Ok(());
            }
        };
        ensure(generation >= floor, || "a write below the floor was accepted".into())?;
        ensure(!self.head.frozen.contains_key(&pg), || "a write to a frozen group".into())?;
        ensure(self.durable.seen(session, sequence) == Seen::New, || {
            "a duplicate was accepted".into()
        })?;
        let client = &mut self.clients[c];
        client.next = client.next.max(sequence + 1);
        client.open.insert(sequence);
        client.retry.retain(|s| *s != sequence);
        let payload = self.random_bytes(len as usize);
        // What the blocks must become, by the model alone.
        let object = &self.objects[&(inode, base.content)];
        let scope = Scope::of(inode, ChunkIndex(chunk), PGS);
        let dirty = self.head.inodes.get(&scope).map(|i| &i.dirty);
        let mut bytes = Vec::new();
        for b in plan.first_block..plan.first_block + plan.blocks {
            match dirty.and_then(|d| d.get(&(chunk, b))) {
                Some((_, d)) => bytes.extend_from_slice(d),
                None => bytes.extend(object.block((chunk, b), base.valid_bytes)),
            }
        }
        bytes[offset as usize % 4096..][..payload.len()].copy_from_slice(&payload);
        let expected = bytes.chunks(4096).map(Block::from).collect();
        let left = plan.writes.clone();
        self.plans.push(Plan { plan, op, payload, buffer: None, expected, left });
        Ok(())
    }

    /// One step of one plan: resolve its edges, write one piece, or commit.
    pub fn progress(&mut self) -> Check {
        if !self.fills.is_empty() && self.rng.random_bool(0.2) {
            return self.progress_fill();
        }
        if self.plans.is_empty() {
            return Ok(());
        }
        let i = self.rng.random_range(0..self.plans.len());
        if self.plans[i].buffer.is_none() {
            let p = &self.plans[i];
            let buffer = self.resolve(&p.plan, &p.op, &p.payload)?;
            for (k, b) in buffer.chunks(4096).enumerate() {
                ensure(*b == *self.plans[i].expected[k], || {
                    format!("block {} is merged wrongly", self.plans[i].plan.first_block + k as u32)
                })?;
            }
            self.plans[i].buffer = Some(buffer);
            return Ok(());
        }
        let early = self.rule == Break::CommitBeforeData && self.rng.random_bool(0.2);
        if !self.plans[i].left.is_empty() && !early {
            let k = self.rng.random_range(0..self.plans[i].left.len());
            let w = self.plans[i].left.swap_remove(k);
            let p = &self.plans[i];
            let bytes = &p.buffer.as_ref().expect("resolved above")[w.range];
            self.disk.write(w.offset, bytes);
            return Ok(());
        }
        let p = self.plans.swap_remove(i);
        let id = p.plan.id;
        if self.rng.random_bool(0.05) {
            self.store.abort_write(id);
            self.clients[p.op.session.0 as usize - 1].open.remove(&p.op.sequence.0);
            return Ok(());
        }
        let buffer = p.buffer.expect("resolved above");
        let crcs: Vec<u32> = buffer.chunks(4096).map(crc32c).collect();
        let inline = if p.plan.inline { &buffer[..] } else { &[] };
        match self.store.commit_write(id, &crcs, inline) {
            Ok(ticket) => {
                self.counts.writes += 1;
                let floor = self.least(Scope::of(p.op.inode, p.op.chunk, PGS));
                ensure(p.op.generation >= floor, || "a commit below the floor".into())?;
                let end = p.op.chunk.start() + u64::from(p.op.offset) + u64::from(p.op.len);
                let op = Op::Write {
                    inode: p.op.inode,
                    chunk: p.op.chunk.0,
                    first: p.plan.first_block,
                    blocks: p.expected,
                    end,
                    generation: p.op.generation,
                    session: p.op.session,
                    sequence: p.op.sequence.0,
                    below: p.op.answered_below.0,
                };
                self.logged(ticket, op);
            }
            Err(
                WriteError::StaleGeneration { .. }
                | WriteError::Frozen { .. }
                | WriteError::Dropped,
            ) => {
                self.counts.refused += 1;
                self.clients[p.op.session.0 as usize - 1].open.remove(&p.op.sequence.0);
            }
            Err(e) => return Err(format!("commit_write: {e}")),
        }
        Ok(())
    }

    pub fn resolve(
        &self,
        plan: &WritePlan,
        op: &WriteOp,
        payload: &[u8],
    ) -> Result<Vec<u8>, String> {
        let mut buffer = vec![0xeeu8; plan.blocks as usize * 4096];
        buffer[plan.head..plan.head + payload.len()].copy_from_slice(payload);
        for e in &plan.edges {
            let old = match e.source {
                EdgeSource::Zero => vec![0u8; 4096],
                EdgeSource::Device { offset, crc, valid } => {
                    let mut b = self.disk.read(offset, 4096).to_vec();
                    ensure(crc32c(&b) == crc, || "an edge does not match its checksum".into())?;
                    b[valid as usize..].fill(0);
                    b
                }
                EdgeSource::Miss { valid } => {
                    let object = &self.objects[&(op.inode, op.base.content)];
                    let start = block_start((op.chunk.0, e.block));
                    object.block((op.chunk.0, e.block), start + u64::from(valid))
                }
            };
            for r in &e.fill {
                buffer[e.at + r.start..e.at + r.end].copy_from_slice(&old[r.clone()]);
            }
        }
        Ok(buffer)
    }

    // --- flush, cut -------------------------------------------------------------------------------------

    pub fn flush(&mut self) -> Check {
        // Mostly those that are waited for.
        let f = match self.files.iter().position(|f| matches!(f.flush, Some((_, Phase::Sealing)))) {
            Some(f) if self.rng.random_bool(0.6) => f,
            _ => self.rng.random_range(0..self.files.len()),
        };
        let inode = self.files[f].inode;
        let Some((g, phase)) = self.files[f].flush.take() else {
            let holds = |s: Scope| self.head.inodes.get(&s).is_some_and(|i| !i.dirty.is_empty());
            let dirty = scopes(inode).into_iter().any(holds);
            if dirty && self.rng.random_bool(0.2) {
                // Given up before the seal came here: the next tag is granted, the old one is still out.
                self.files[f].generation = self.files[f].generation.next();
            } else if dirty || self.rng.random_bool(0.1) {
                self.files[f].flush = Some((self.files[f].generation, Phase::Sealing));
            }
            return Ok(());
        };
        let next = match phase {
            Phase::Sealing if !self.cuts_sent(f)? => Some(Phase::Sealing),
            Phase::Sealing => {
                let mut sealed = true;
                for scope in scopes(inode) {
                    let mut r = self.store.seal(scope, g);
                    if matches!(r, Err(ControlError::TooManySeals { .. })) {
                        // Aborts were lost: the leader repeats the newest.
                        let older = Generation(g.0 - 1);
                        let aborted = self.store.flush_aborted(scope, older);
                        self.control(aborted, Op::Aborted(scope, older))?;
                        r = Err(ControlError::Wait(WaitFor::Control));
                    }
                    sealed &= matches!(r, Ok(None));
                    self.control(r, Op::Seal(scope, g))?;
                    // Others are asked later: writers go on in between.
                    if !sealed && self.rng.random_bool(0.3) {
                        break;
                    }
                }
                if sealed { Some(self.sealed(f, g)?) } else { Some(Phase::Sealing) }
            }
            Phase::Sealed { object, content, old_valid, limit } => {
                if self.rng.random_bool(0.3) {
                    // Linger: writers and truncates go on.
                    Some(Phase::Sealed { object, content, old_valid, limit })
                } else if self.rng.random_bool(0.25) {
                    self.counts.aborts += 1;
                    Some(Phase::Aborting { sent: None })
                } else {
                    let file = &mut self.files[f];
                    let valid_bytes = object.len.min(limit);
                    let done = FlushDone {
                        inode,
                        generation: g,
                        content,
                        old_content: file.content,
                        valid_bytes,
                        old_valid_bytes: old_valid,
                    };
                    self.objects.insert((inode, content), object);
                    file.content = content;
                    file.valid = valid_bytes;
                    file.version.0 += 1;
                    Some(Phase::Committed { done, sent: None })
                }
            }
            Phase::Committed { done, sent: Some(t) } if t > self.durable_ticket => {
                Some(Phase::Committed { done, sent: Some(t) })
            }
            Phase::Committed { sent: Some(_), .. } => {
                self.counts.flushes += 1;
                None
            }
            Phase::Committed { done, sent: None } => {
                let (mut nothing, mut waits, mut sent) = (true, false, None);
                for scope in scopes(inode) {
                    let r = self.store.flush_done(scope.pg, &done);
                    nothing &= matches!(r, Ok(None));
                    waits |= matches!(r, Err(ControlError::Wait(_)));
                    sent = sent.max(self.control(r, Op::FlushDone(scope.pg, done))?);
                }
                let sent = sent.filter(|_| !waits);
                (!nothing).then_some(Phase::Committed { done, sent })
            }
            Phase::Aborting { sent: Some(t) } if t > self.durable_ticket => {
                Some(Phase::Aborting { sent: Some(t) })
            }
            Phase::Aborting { sent: Some(_) } => None,
            Phase::Aborting { sent: None } => {
                // Sometimes the abort is lost and the next seal finds the old pins.
                if self.rng.random_bool(0.2) {
                    None
                } else {
                    let (mut nothing, mut waits, mut sent) = (true, false, None);
                    for scope in scopes(inode) {
                        let r = self.store.flush_aborted(scope, g);
                        nothing &= matches!(r, Ok(None));
                        waits |= matches!(r, Err(ControlError::Wait(_)));
                        sent = sent.max(self.control(r, Op::Aborted(scope, g))?);
                    }
                    let sent = sent.filter(|_| !waits);
                    (!nothing).then_some(Phase::Aborting { sent })
                }
            }
        };
        self.files[f].flush = next.map(|p| (g, p));
        Ok(())
    }

    /// Whether every cut is in the journal (a seal must not pin what a truncate took away).
    pub fn cuts_sent(&mut self, f: usize) -> Result<bool, String> {
        self.present(f)?;
        let file = &self.files[f];
        Ok(file.cuts.is_empty() || self.least_view(file.inode) >= file.version)
    }

    /// The seal is durable: build the object from the pins, and check them against the model.
    pub fn sealed(&mut self, f: usize, g: Generation) -> Result<Phase, String> {
        self.counts.seals += 1;
        let inode = self.files[f].inode;
        let (base, old_valid) = (self.files[f].content, self.files[f].valid);
        let (mut snapshot, mut high) = (BTreeMap::new(), 0);
        for scope in scopes(inode) {
            let model = self.durable.inodes.get(&scope).and_then(|i| i.seals.get(&g)).cloned();
            let Some((blocks, mark)) = model else {
                return Err("sealed, says the store only".into());
            };
            let sealed = self.store.sealed(scope, g).ok_or("a durable seal has no answer")?;
            ensure(sealed.high_water == mark, || "high water".into())?;
            snapshot.extend(blocks);
            high = high.max(mark);
        }
        let old = &self.objects[&(inode, base)];
        let mut object = Object { len: old_valid.max(high), blocks: BTreeMap::new() };
        let view = BaseView { content: base, valid_bytes: old_valid };
        for chunk in CHUNKS {
            let plan = self
                .store
                .plan_read_pinned(inode, g, ChunkIndex(chunk), 0..CHUNK_BLOCKS, view)
                .ok_or("sealed and not readable")?;
            for p in &plan.pieces {
                let bytes = match p.source {
                    PieceSource::Device { .. } => Some(read_piece(&self.disk, &p.source)?),
                    _ => None,
                };
                for (i, b) in p.blocks.clone().enumerate() {
                    let want = snapshot
                        .get(&(chunk, b))
                        .map_or_else(|| old.block((chunk, b), old_valid), |b| b.to_vec());
                    let got = match (&bytes, &p.source) {
                        (Some(v), _) => v[i].clone(),
                        (_, PieceSource::Miss) => old.block((chunk, b), old_valid),
                        _ => vec![0; 4096],
                    };
                    ensure(got == want, || {
                        format!(
                            "pinned block {b} of chunk {chunk} of {inode} at {g} is wrong: {:?}",
                            p.source
                        )
                    })?;
                    if want.iter().any(|b| *b != 0) {
                        object.blocks.insert((chunk, b), want.into());
                    }
                }
            }
            if let Some(guard) = plan.guard {
                self.store.release(guard);
            }
        }
        let file = &mut self.files[f];
        file.generation = file.generation.max(g.next());
        file.contents += 1;
        Ok(Phase::Sealed { object, content: ContentId(file.contents), old_valid, limit: u64::MAX })
    }

    pub fn truncate(&mut self) {
        let f = self.rng.random_range(0..self.files.len());
        let at = match self.rng.random_range(0..3) {
            0 => 0,
            1 => self.rng.random_range(0..100_000),
            _ => {
                block_start((CHUNKS[self.rng.random_range(0..3)], 0))
                    + self.rng.random_range(0..500_000)
            }
        };
        let inode = self.files[f].inode;
        let view = |s: &Scope| self.durable.inodes.get(s).map_or(ViewVersion(0), |i| i.view);
        let acked = scopes(inode).iter().map(view).min().unwrap_or_default();
        let file = &mut self.files[f];
        if matches!(file.flush, Some((_, Phase::Sealing))) {
            return;
        }
        // Cuts go once the primary acked them; sometimes they linger.
        if acked >= file.version && self.rng.random_bool(0.5) {
            file.cuts.clear();
        }
        if file.cuts.len() == 8 {
            return;
        }
        file.cuts.push(Cut { generation: file.generation, at });
        file.generation.0 += 1;
        file.valid = file.valid.min(at);
        file.version.0 += 1;
        if let Some((_, Phase::Sealed { limit, .. })) = &mut file.flush {
            *limit = (*limit).min(at);
        }
        self.counts.cuts += 1;
    }

    // --- reads, fills, space -------------------------------------------------------------------------------

    pub fn read(&mut self) -> Check {
        if !self.reads.is_empty() && self.rng.random_bool(0.5) {
            let i = self.rng.random_range(0..self.reads.len());
            let r = self.reads.swap_remove(i);
            return self.finish_read(r);
        }
        let f = self.rng.random_range(0..self.files.len());
        if !self.present(f)? {
            return Ok(());
        }
        let file = &self.files[f];
        let (inode, base) =
            (file.inode, BaseView { content: file.content, valid_bytes: file.valid });
        let chunk = CHUNKS[self.rng.random_range(0..CHUNKS.len())];
        let first = self.rng.random_range(0..100);
        let end = first + self.rng.random_range(1..100);
        let plan = self.store.plan_read(inode, ChunkIndex(chunk), first..end, base);
        let object = &self.objects[&(inode, base.content)];
        let scope = Scope::of(inode, ChunkIndex(chunk), PGS);
        let dirty = self.durable.inodes.get(&scope).map(|i| &i.dirty);
        let expected = (first..end)
            .map(|b| match dirty.and_then(|d| d.get(&(chunk, b))) {
                Some((_, d)) => Expected::Dirty(d.clone()),
                None if block_start((chunk, b)) >= base.valid_bytes => Expected::Hole,
                None => Expected::Base(object.block((chunk, b), base.valid_bytes)),
            })
            .collect();
        let mut read = OpenRead { plan, expected, released: false };
        if self.rule == Break::ReleaseEarly
            && let Some(g) = read.plan.guard.take()
        {
            self.store.release(g);
            read.released = true;
        }
        if self.reads.len() < 4 {
            self.reads.push(read)
        } else {
            self.finish_read(read)?
        }
        Ok(())
    }

    pub fn finish_read(&mut self, r: OpenRead) -> Check {
        self.counts.reads += 1;
        let mut expected = r.expected.iter();
        for p in &r.plan.pieces {
            let bytes = match &p.source {
                PieceSource::Device { .. } => Some(read_piece(&self.disk, &p.source)?),
                _ => None,
            };
            for (i, b) in p.blocks.clone().enumerate() {
                let ok = match (&p.source, expected.next()) {
                    (PieceSource::Device { dirty: true, .. }, Some(Expected::Dirty(d))) => {
                        bytes.as_ref().is_some_and(|v| v[i][..] == d[..])
                    }
                    (PieceSource::Device { dirty: false, .. }, Some(Expected::Base(d))) => {
                        bytes.as_ref().is_some_and(|v| v[i] == *d)
                    }
                    (PieceSource::Zero, Some(Expected::Hole))
                    | (PieceSource::Miss, Some(Expected::Base(_))) => true,
                    _ => false,
                };
                ensure(ok, || format!("read of block {b} is wrong ({:?})", p.blocks))?;
            }
        }
        ensure(expected.next().is_none(), || "a read left blocks out".into())?;
        assert!(r.plan.guard.is_none() || !r.released);
        if let Some(g) = r.plan.guard {
            self.store.release(g);
        }
        Ok(())
    }

    pub fn fill(&mut self) -> Check {
        let f = self.rng.random_range(0..self.files.len());
        if !self.present(f)? {
            return Ok(());
        }
        let file = &self.files[f];
        let (inode, content, valid) = (file.inode, file.content, file.valid);
        let chunk = CHUNKS[self.rng.random_range(0..CHUNKS.len())];
        let base = BaseView { content, valid_bytes: valid };
        let plan = self.store.plan_read(inode, ChunkIndex(chunk), 0..CHUNK_BLOCKS, base);
        if let Some(g) = plan.guard {
            self.store.release(g);
        }
        let Some(miss) = plan.pieces.iter().find(|p| p.source == PieceSource::Miss) else {
            return Ok(());
        };
        let first = miss.blocks.start;
        let blocks = (miss.blocks.end - first).min(self.rng.random_range(1..64));
        let last = block_start((chunk, first + blocks - 1));
        let op = FillOp {
            inode,
            chunk: ChunkIndex(chunk),
            first_block: first,
            blocks,
            content,
            tail_valid: (valid - last).min(4096) as u32,
        };
        let plan = match self.store.begin_fill(&op) {
            Ok(plan) => plan,
            Err(WriteError::NoSpace { .. }) => return self.evict(),
            Err(WriteError::Wait(_) | WriteError::Frozen { .. }) => return Ok(()),
            Err(e) => return Err(format!("begin_fill: {e}")),
        };
        let object = &self.objects[&(inode, content)];
        let bytes: Vec<u8> =
            (first..first + blocks).flat_map(|b| object.block((chunk, b), valid)).collect();
        let left = plan.writes.clone();
        self.fills.push(FillPlanned { plan, bytes, left });
        Ok(())
    }

    pub fn progress_fill(&mut self) -> Check {
        let i = self.rng.random_range(0..self.fills.len());
        if let Some(w) = self.fills[i].left.pop() {
            self.disk.write(w.offset, &self.fills[i].bytes[w.range]);
            return Ok(());
        }
        let f = self.fills.swap_remove(i);
        if self.rng.random_bool(0.1) {
            self.store.abort_fill(f.plan.id);
            return Ok(());
        }
        let crcs: Vec<u32> = f.bytes.chunks(4096).map(crc32c).collect();
        match self.store.commit_fill(f.plan.id, &crcs) {
            Ok(_) => self.counts.fills += 1,
            Err(WriteError::Dropped) => {}
            Err(e) => return Err(format!("commit_fill: {e}")),
        }
        Ok(())
    }

    pub fn evict(&mut self) -> Check {
        let r = if self.rng.random_bool(0.1) {
            self.store.evict_clean(&[self.files[0].inode]).map(|_| None)
        } else {
            self.store.evict(self.rng.random_range(1..500_000))
        };
        match r {
            Ok(Some(_)) => self.counts.evictions += 1,
            Ok(None) | Err(ControlError::Wait(_)) => {}
            Err(e) => return Err(format!("evict: {e}")),
        }
        Ok(())
    }

    pub fn odds_and_ends(&mut self) -> Check {
        let pg = self.rng.random_range(0..PGS);
        let epoch = PgEpoch(self.rng.random_range(1..4));
        match self.rng.random_range(0..12) {
            0..2 => {
                self.counts.freezes += 1;
                let r = self.store.freeze(PgId(pg), epoch);
                self.control(r, Op::Frozen(pg, epoch))?;
            }
            2..7 => {
                let frozen = self.head.frozen.iter().next().map(|(p, e)| (*p, *e));
                let (pg, epoch) = frozen.unwrap_or((pg, epoch));
                let r = self.store.thaw(PgId(pg), epoch);
                self.control(r, Op::Thaw(pg, epoch))?;
            }
            7 => match self.store.release_pg(PgId(pg), epoch) {
                Err(ControlError::StillDirty { .. }) => {}
                r => {
                    self.control(r, Op::Released(pg))?;
                    // Until it is durable the group counts as frozen: the model does not know; wait.
                    while self.store.frozen(PgId(pg)).is_some() && self.store.pending().records > 0
                        || self.batch.is_some()
                    {
                        self.complete_batch()?;
                        self.take_batch()?;
                        if self.batch.is_none() {
                            self.checkpoint()?;
                        }
                    }
                }
            },
            8 => {
                let f = self.rng.random_range(0..self.files.len());
                let file = &self.files[f];
                if file.flush.is_none() {
                    // A fence: the session that wrote it expired.
                    let (inode, floor) = (file.inode, file.generation.next());
                    for scope in scopes(inode) {
                        let fresh = self.head.inodes.get(&scope).is_none_or(|i| i.floor < floor);
                        let r = self.store.set_floor(scope, floor);
                        if fresh && self.control(r, Op::Floor(scope, floor))?.is_some() {
                            self.files[f].generation = floor;
                        }
                    }
                }
            }
            9 if self.rng.random_bool(0.05) => {
                let c = self.rng.random_range(0..self.clients.len());
                let session = SessionId(c as u64 + 1);
                if self.clients[c].open.is_empty() && self.clients[c].retry.is_empty() {
                    let r = self.store.drop_session(session);
                    self.control(r, Op::SessionGone(session))?;
                }
            }
            9 => {
                let c = self.rng.random_range(0..self.clients.len());
                let below = self.clients[c].open.first().copied().unwrap_or(self.clients[c].next);
                let session = SessionId(c as u64 + 1);
                let below = self.clients[c].retry.iter().copied().min().unwrap_or(below).min(below);
                let r = self.store.trim_session(session, Sequence(below));
                self.control(r, Op::Trim(session, below))?;
            }
            10 => {
                let node = NodeId(self.rng.random_range(1..5));
                let r = self.store.set_node(node);
                self.control(r, Op::Node(node))?;
            }
            _ => {
                if self.all.len() < 12 {
                    let f = self.rng.random_range(0..self.files.len());
                    self.gone.push(self.files[f].inode);
                    self.files.swap_remove(f);
                    self.create();
                    self.counts.drops += 1;
                }
            }
        }
        // The metadata plane repeats a drop until it is answered.
        for inode in self.gone.clone() {
            if self.rng.random_bool(0.5) {
                for scope in scopes(inode) {
                    let r = self.store.drop_inode(scope);
                    self.control(r, Op::Drop(scope))?;
                }
            }
        }
        Ok(())
    }
}
