//! The leader of the replication simulator: truncates, removes, seals, uploads, tells.

use super::*;

impl World {
    pub fn leader_step(&mut self) {
        let file = self.rng.random_range(0..FILES as usize);
        let run = self.rng.random_range(0..RUNS);
        match self.rng.random_range(0..10) {
            0 | 1 => self.truncate(file),
            2 if self.rng.random_bool(0.5) => self.remove(file),
            3 => self.tell_of_gone(),
            _ => self.leader_file(file, run),
        }
    }

    /// The command commits; clients and the leader tell the primaries. Only what nobody is writing goes, so that it
    /// is known what is left.
    pub fn truncate(&mut self, file: usize) {
        let at = start_of(self.rng.random_range(0..CELLS.len()));
        let (now, version) = (self.tick(), self.map.version);
        let f = &mut self.files.all[file];
        let after = |cell: &usize| start_of(*cell) >= at;
        let busy = (0..CELLS.len()).filter(after).any(|c| !f.cells[c].pending.is_empty());
        if busy || f.flush != Flush::None || f.notice.is_some() || f.view.cuts.len() >= 8 {
            return;
        }
        (0..CELLS.len()).filter(after).for_each(|cell| f.cells[cell].history.cut(now));
        f.since = version;
        f.view.cuts.push(Cut { generation: f.generation, at });
        f.view.version = ViewVersion(f.view.version.0 + 1);
        f.generation = f.generation.next();
        f.heard_cuts = [false; RUNS];
        if let Some(b) = f.view.backing.as_mut() {
            b.limit = b.limit.min(at);
        }
        self.tally.cuts += 1;
        self.trace(|| format!("file {file} is cut at {at}"));
        // Several clients may learn of it at once.
        for session in 1..=self.rng.random_range(0..=SESSIONS as u64) {
            for run in 0..RUNS {
                if let Some(n) = self.primary(self.pg(file, run)) {
                    self.present(n, file, SessionId(session), version);
                }
            }
        }
    }

    /// A file goes, and another one takes its name.
    pub fn remove(&mut self, file: usize) {
        let (now, version) = (self.tick(), self.map.version);
        let f = &mut self.files.all[file];
        let busy = f.asked != [false; RUNS] || f.cells.iter().any(|c| !c.pending.is_empty());
        if busy || f.flush != Flush::None || f.notice.is_some() {
            return;
        }
        let inode = next_inode(&mut self.files.last_inode, 0..SHARED);
        self.files.gone.insert(f.inode, ([false; RUNS], [false; RUNS]));
        (f.inode, f.generation, f.since) = (inode, Generation(1), version);
        (f.view, f.heard_cuts) = (first_view(), [false; RUNS]);
        f.cells.iter_mut().for_each(|c| c.history.cut(now));
        self.tally.removed += 1;
        self.trace(|| format!("file {file} is gone"));
    }

    pub fn tell_of_gone(&mut self) {
        let owed = |g: &([bool; RUNS], [bool; RUNS])| (0..RUNS).find(|r| !g.0[*r] && !g.1[*r]);
        let next = self.files.gone.iter().find_map(|(i, g)| Some((*i, owed(g)?)));
        let Some((inode, run)) = next else { return };
        let pg = PgId::of(inode, RunIndex(run as u32), PGS);
        let Some(n) = self.primary(pg) else { return };
        self.files.gone.get_mut(&inode).expect("known").1[run] = true;
        let drop = Control::DropInodes(self.map.version, vec![inode]);
        self.meta_ask(n, &drop, Request::Drop(inode, run));
    }

    pub fn leader_file(&mut self, file: usize, run: usize) {
        let f = &self.files.all[file];
        let Some(n) = self.primary(self.pg(file, run)) else { return };
        if f.asked[run] {
            return;
        }
        let (inode, g) = (f.inode, f.generation);
        let version = self.map.version;
        if let Some((told, heard)) = f.notice.clone() {
            if !heard[run] {
                let notice = match told {
                    Told::Done(done) => Control::FlushDone(version, vec![done]),
                    Told::Aborted(g) => Control::FlushAborted(version, vec![(inode, g)]),
                };
                self.control(n, file, run, &notice, Request::Notice(file, run));
            }
            return;
        }
        if !f.view.cuts.is_empty() {
            if !f.heard_cuts[run] {
                let asked = Request::Cut(file, run, f.view.version);
                let views = Control::ApplyViews(vec![self.grant(
                    file,
                    GrantMode::Read,
                    SessionId(0),
                    version,
                )]);
                self.control(n, file, run, &views, asked);
            }
            return;
        }
        match f.flush.clone() {
            Flush::None => {
                if !self.files.still {
                    self.files.all[file].flush = Flush::Sealing(g, [false; RUNS]);
                }
            }
            Flush::Sealing(g, sealed) => {
                if !sealed[run] {
                    let item = SealItem { inode, generation: g, alloc_limit: 2 * RUN_BYTES };
                    let seal = Control::Seal(version, vec![item]);
                    self.control(n, file, run, &seal, Request::Seal(file, g, run));
                }
            }
            Flush::Sealed(g) => {
                if self.rng.random_bool(0.2) {
                    return self.abort(file, g);
                }
                self.files.all[file].flush = Flush::Putting(g, [const { None }; RUNS]);
            }
            Flush::Putting(g, parts) => {
                if self.rng.random_bool(0.03) {
                    return self.abort(file, g);
                }
                if parts[run].is_none() {
                    let part = UploadPart {
                        inode,
                        generation: g,
                        grant: self.grant(file, GrantMode::Read, SessionId(0), version),
                        key: format!("file-{file}"),
                        upload_id: format!("{g}"),
                        part_number: run as u32 + 1,
                        run: RunIndex(run as u32),
                        length: LENGTHS[run] as u32,
                    };
                    let part = Control::UploadPart(part);
                    self.control(n, file, run, &part, Request::Part(file, g, run));
                }
            }
        }
    }

    pub fn abort(&mut self, file: usize, g: Generation) {
        self.tally.aborted += 1;
        let f = &mut self.files.all[file];
        f.flush = Flush::None;
        f.notice = Some((Told::Aborted(g), [false; RUNS]));
    }

    pub fn control(&mut self, n: u32, file: usize, run: usize, control: &Control, asked: Request) {
        self.files.all[file].asked[run] = true;
        self.meta_ask(n, control, asked);
    }

    pub fn meta_ask(&mut self, n: u32, control: &Control, asked: Request) {
        self.trace(|| format!("leader asks node {n}: {asked:?}"));
        let header = Header::request(Opcode::Control, 0);
        self.ask(n, Role::Meta, SessionId(0), (header, codec::encode(control), None), asked);
    }

    pub fn s3_call(&mut self, job: Job<AlignedBuf>) -> JobDone<AlignedBuf> {
        let token = job.token;
        match job.work {
            Work::Fetch { key, etag, range, mut buf, at } => {
                let object = self.s3.objects.get(&key).filter(|o| o.0 == etag);
                let result = match object {
                    Some((_, body)) => {
                        let len = (range.end - range.start) as usize;
                        let target = &mut buf[at..at + len];
                        target.fill(0);
                        for (start, bytes) in body {
                            let (from, to) = (*start.max(&range.start), start + bytes.len() as u64);
                            let to = to.min(range.end);
                            if from < to {
                                let part = &bytes[(from - start) as usize..(to - start) as usize];
                                let place = (from - range.start) as usize;
                                target[place..place + part.len()].copy_from_slice(part);
                            }
                        }
                        Ok(())
                    }
                    None => Err(FetchError::Changed),
                };
                JobDone::Fetched { token, buf, result }
            }
            Work::UploadPart { key, part_number, body, .. } => {
                let mut start = LENGTHS[..part_number as usize - 1].iter().sum::<u64>();
                let mut bytes = Sparse::new();
                for piece in body {
                    match piece {
                        Piece::Buf(buf, range) => {
                            let len = range.len() as u64;
                            bytes.push((start, buf[range].to_vec()));
                            start += len;
                        }
                        Piece::Shared(buf, range) => {
                            let len = range.len() as u64;
                            bytes.push((start, buf[range].to_vec()));
                            start += len;
                        }
                        Piece::Zeros(n) => start += n as u64,
                    }
                }
                self.files.etags += 1;
                let etag = format!("p{}", self.files.etags);
                self.s3.parts.insert(format!("{key}.{etag}"), bytes);
                JobDone::Stored { token, outcome: StoreOutcome::Stored { etag } }
            }
            other => panic!("not asked for here: {other:?}"),
        }
    }
}
