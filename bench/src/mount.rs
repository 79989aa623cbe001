//! `ebb bench mount`: whole jobs through a mount point, and the same jobs on a plain directory turn
//! by turn, as programs do them: write(2), read(2), `tar`, `ls`, `grep`, `rm`.
//!
//! Before each job that reads, the kernel's caches are dropped: for the whole machine if we are root,
//! else only the file's own pages by `posix_fadvise`; the notes say which. Between jobs the data is
//! flushed to S3 (on the plain side: `syncfs`), so that no job pays for the upload of another; how
//! long that takes is a row of its own.

use crate::BenchError;
use crate::report::{Bar, Limit, columns, median, number};
use crate::tar;
use hdrhistogram::Histogram;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use serde::Serialize;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The mount point, or a directory under it.
    pub dir: PathBuf,
    /// A directory of another file system, to compare with.
    pub plain: Option<PathBuf>,
    /// Runs; figures are their medians.
    pub runs: u32,
    /// Bytes of the large file.
    pub file_bytes: u64,
    /// Small files.
    pub files: u32,
    /// Seconds of random reads.
    pub seconds: u64,
    /// Drop the whole machine's kernel caches where that is allowed, not just the file's pages.
    pub machine_caches: bool,
}

/// One job: medians over the runs.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What was done.
    pub job: String,
    /// Of the figures: "MB/s", "s", "/s", "µs".
    pub unit: &'static str,
    /// Through the mount.
    pub ours: f64,
    /// On the plain directory.
    pub plain: Option<f64>,
    /// ours / plain.
    pub ratio: Option<f64>,
    /// What ours should reach.
    pub bar: Option<Bar>,
    /// Ours of each run.
    pub ours_runs: Vec<f64>,
    /// Plain of each run.
    pub plain_runs: Vec<f64>,
}

/// What came out.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// Runs.
    pub runs: u32,
    /// All jobs.
    pub rows: Vec<Row>,
    /// What a reader should know.
    pub notes: Vec<String>,
}

/// A kind of figure: its name is made with the sizes of the plan.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Job {
    Write,
    WriteSettle,
    Read,
    Random1,
    Random1P50,
    Random32,
    Untar,
    UntarSettle,
    List,
    Grep,
    Remove,
}

impl Job {
    const ALL: [Self; 11] = [
        Self::Write,
        Self::WriteSettle,
        Self::Read,
        Self::Random1,
        Self::Random1P50,
        Self::Random32,
        Self::Untar,
        Self::UntarSettle,
        Self::List,
        Self::Grep,
        Self::Remove,
    ];

    fn name(self, plan: &Plan) -> String {
        let size = match plan.file_bytes {
            b if b.is_multiple_of(1 << 30) => format!("{} GiB", b >> 30),
            b => format!("{} MiB", b >> 20),
        };
        let files = plan.files;
        match self {
            Self::Write => format!("write {size}, fsync"),
            Self::WriteSettle => "  then: flush to S3 | sync".into(),
            Self::Read => format!("read {size}, kernel caches dropped"),
            Self::Random1 => "random 4 KiB reads, 1 thread".into(),
            Self::Random1P50 => "  p50 of them".into(),
            Self::Random32 => "random 4 KiB reads, 32 threads".into(),
            Self::Untar => format!("untar {files} files"),
            Self::UntarSettle => "  then: flush to S3 | sync".into(),
            Self::List => "ls -lR of them, caches dropped".into(),
            Self::Grep => "grep -r of them, caches dropped".into(),
            Self::Remove => "rm -rf of them".into(),
        }
    }

    fn unit(self) -> &'static str {
        match self {
            Self::Write | Self::Read => "MB/s",
            Self::Random1 | Self::Random32 => "/s",
            Self::Random1P50 => "µs",
            _ => "s",
        }
    }

    /// The limits hold for the sizes they were given for.
    fn limit(self, plan: &Plan) -> Option<Limit> {
        let whole = plan.files >= 5000;
        match self {
            Self::Write => Some(Limit::at_least(250.0)),
            Self::Read => Some(Limit::at_least(700.0)),
            Self::Random1P50 => Some(Limit::at_most(150.0).goal()),
            Self::Random32 => Some(Limit::at_least(40_000.0).goal()),
            Self::Untar if whole => Some(Limit::at_most(8.0)),
            Self::List if whole => Some(Limit::at_most(0.5).goal()),
            Self::Grep if whole => Some(Limit::at_most(2.0).goal()),
            Self::Remove if whole => Some(Limit::at_most(2.0).goal()),
            _ => None,
        }
    }
}

/// The figures of one side.
#[derive(Default)]
struct Figures(Vec<(Job, f64)>);

impl Figures {
    fn add(&mut self, job: Job, figure: f64) {
        self.0.push((job, figure));
    }
    fn of(&self, job: Job) -> Vec<f64> {
        self.0.iter().filter(|(j, _)| *j == job).map(|(_, f)| *f).collect()
    }
}

/// A directory of ours under the one named, removed when it goes.
struct Scratch(PathBuf);

impl Scratch {
    fn new(under: &Path) -> Result<Self, BenchError> {
        let dir = under.join(format!("ebb-bench-{}", std::process::id()));
        std::fs::create_dir(&dir).map_err(BenchError::file("create", &dir))?;
        Ok(Self(dir))
    }
    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Runs the plan; blocking. `settle` puts everything of the mount into S3; `say` gets a line per
/// step.
pub fn run(
    plan: &Plan,
    settle: impl Fn() -> Result<(), String>,
    say: impl Fn(&str),
) -> Result<Outcome, BenchError> {
    const MIB: u64 = 1 << 20;
    if plan.runs == 0 || plan.files == 0 || plan.seconds == 0 {
        return Err(BenchError::Plan("runs, files and seconds must be above zero".into()));
    }
    if plan.file_bytes < 16 * MIB || !plan.file_bytes.is_multiple_of(MIB) {
        return Err(BenchError::Plan("--file must be whole MiB, at least 16".into()));
    }
    let archive_dir = Scratch::new(&std::env::temp_dir())?;
    let archive = archive_dir.path("tree.tar");
    let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
    let bytes = File::create(&archive)
        .and_then(|f| {
            let mut out = std::io::BufWriter::new(f);
            let bytes = tar::write(&mut out, plan.files, uid, gid)?;
            out.flush()?;
            Ok(bytes)
        })
        .map_err(BenchError::file("write", &archive))?;
    let mut notes = vec![
        if drop_caches(plan) {
            "kernel caches dropped by /proc/sys/vm/drop_caches".to_owned()
        } else {
            "the machine's caches stay (not root): only the large file's pages are dropped (posix_fadvise); `ls` and `grep` find kernel caches warm"
                .to_owned()
        },
        format!("the {} small files hold {:.1} MB in all", plan.files, bytes as f64 / 1e6),
    ];
    let (mut ours, mut plain) = (Figures::default(), Figures::default());
    let settle_ours = |_: &Path| settle();
    for run in 1..=plan.runs {
        let told = |side: &'static str| {
            let say = &say;
            move |what: &str| say(&format!("run {run}, {side}: {what}"))
        };
        side(plan, &plan.dir, &archive, &settle_ours, &mut ours, &mut notes, told("ours"))?;
        if let Some(dir) = &plan.plain {
            side(plan, dir, &archive, &sync_fs, &mut plain, &mut notes, told("plain"))?;
        }
    }
    let rows = Job::ALL
        .into_iter()
        .filter_map(|job| {
            let (ours_runs, plain_runs) = (ours.of(job), plain.of(job));
            if ours_runs.is_empty() {
                return None;
            }
            let ours = median(&ours_runs);
            let plain = (!plain_runs.is_empty()).then(|| median(&plain_runs));
            let ratio = plain.filter(|p| *p > 0.0).map(|p| ours / p);
            let bar = job.limit(plan).map(|l| l.judge(ours));
            let (job, unit) = (job.name(plan), job.unit());
            Some(Row { job, unit, ours, plain, ratio, bar, ours_runs, plain_runs })
        })
        .collect();
    Ok(Outcome { runs: plan.runs, rows, notes })
}

fn sync_fs(dir: &Path) -> Result<(), String> {
    let dir = File::open(dir).map_err(|e| e.to_string())?;
    nix::unistd::syncfs(&dir).map_err(|e| e.to_string())
}

/// All jobs once in `under`.
fn side(
    plan: &Plan,
    under: &Path,
    archive: &Path,
    settle: &impl Fn(&Path) -> Result<(), String>,
    figures: &mut Figures,
    notes: &mut Vec<String>,
    say: impl Fn(&str),
) -> Result<(), BenchError> {
    let scratch = Scratch::new(under)?;
    let mut settled = |figures: &mut Figures, job: Job| {
        let started = Instant::now();
        match settle(under) {
            Ok(()) => figures.add(job, started.elapsed().as_secs_f64()),
            Err(e) => {
                let note = format!("not flushed between jobs, uploads may disturb: {e}");
                if !notes.contains(&note) {
                    notes.push(note);
                }
            }
        }
    };
    let big = scratch.path("large");
    say("write");
    figures.add(Job::Write, write_large(&big, plan.file_bytes)?);
    settled(figures, Job::WriteSettle);
    say("read");
    figures.add(Job::Read, read_large(&big, plan)?);
    say("random reads");
    let one = random_reads(&big, plan, 1)?;
    figures.add(Job::Random1, one.per_s);
    figures.add(Job::Random1P50, one.p50_us);
    figures.add(Job::Random32, random_reads(&big, plan, 32)?.per_s);
    std::fs::remove_file(&big).map_err(BenchError::file("remove", &big))?;

    say("untar");
    let timed = |figures: &mut Figures, job, program: &'static str, args: &[&Path]| {
        spawn(program, args).map(|s| figures.add(job, s))
    };
    let tree = scratch.path("tree");
    timed(figures, Job::Untar, "tar", &[Path::new("-xf"), archive, Path::new("-C"), &scratch.0])?;
    settled(figures, Job::UntarSettle);
    say("ls -lR");
    drop_caches(plan);
    timed(figures, Job::List, "ls", &[Path::new("-lR"), &tree])?;
    say("grep -r");
    drop_caches(plan);
    let needle = ["-rF", "-e", "no such words anywhere"].map(Path::new);
    timed(figures, Job::Grep, "grep", &[needle[0], needle[1], needle[2], &tree])?;
    say("rm -rf");
    timed(figures, Job::Remove, "rm", &[Path::new("-rf"), &tree])?;
    drop(scratch);
    // Its deletes go too, before the other side's turn.
    let _ = settle(under);
    Ok(())
}

/// Runs a program to its end, in seconds. `grep` that finds nothing exits with 1.
fn spawn(program: &'static str, args: &[&Path]) -> Result<f64, BenchError> {
    let failed = |why: String| BenchError::Program { program, why };
    let started = Instant::now();
    let output = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .map_err(|e| failed(e.to_string()))?;
    let seconds = started.elapsed().as_secs_f64();
    match output.status.code() {
        Some(0) => Ok(seconds),
        Some(1) if program == "grep" => Ok(seconds),
        _ => {
            let said = String::from_utf8_lossy(&output.stderr);
            let last = said.lines().last().unwrap_or("");
            Err(failed(format!("{}: {last}", output.status)))
        }
    }
}

/// MB/s of writing and fsync.
fn write_large(path: &Path, bytes: u64) -> Result<f64, BenchError> {
    let block = crate::chunk::pattern();
    let mut file = File::create(path).map_err(BenchError::file("create", path))?;
    let started = Instant::now();
    let mut write = || -> std::io::Result<()> {
        for _ in 0..bytes / block.len() as u64 {
            file.write_all(&block)?;
        }
        file.sync_all()
    };
    write().map_err(BenchError::file("write", path))?;
    Ok(bytes as f64 / started.elapsed().as_secs_f64() / 1e6)
}

/// MB/s of reading it all, caches dropped.
fn read_large(path: &Path, plan: &Plan) -> Result<f64, BenchError> {
    let mut file = File::open(path).map_err(BenchError::file("open", path))?;
    drop_pages(&file, path, plan)?;
    let mut buffer = vec![0; 1 << 20];
    let expected = crate::chunk::pattern();
    let started = Instant::now();
    let mut total = 0u64;
    loop {
        let n = file.read(&mut buffer).map_err(BenchError::file("read", path))?;
        if n == 0 {
            break;
        }
        // One byte of each read is looked at: enough to see zeros or another file.
        let at = (total % expected.len() as u64) as usize;
        if buffer[0] != expected[at] {
            return Err(BenchError::Plan(format!(
                "{}: byte {total} is not what was written",
                path.display()
            )));
        }
        total += n as u64;
    }
    let rate = total as f64 / started.elapsed().as_secs_f64() / 1e6;
    let bytes = plan.file_bytes;
    if total != bytes {
        return Err(BenchError::Plan(format!(
            "{}: {total} of {bytes} bytes came back",
            path.display()
        )));
    }
    Ok(rate)
}

struct Random {
    per_s: f64,
    p50_us: f64,
}

/// 4 KiB reads at offsets that never repeat, so that no page is found in the kernel's cache.
fn random_reads(path: &Path, plan: &Plan, threads: u64) -> Result<Random, BenchError> {
    const SIZE: u64 = 4096;
    let slots = plan.file_bytes / SIZE;
    let per_thread = slots / threads;
    let file = OpenOptions::new().read(true).open(path).map_err(BenchError::file("open", path))?;
    drop_pages(&file, path, plan)?;
    // Else the kernel would read ahead of pages that are never asked for.
    let _ = posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM);
    let limit = Duration::from_secs(plan.seconds);
    let started = Instant::now();
    let parts: Vec<std::io::Result<Histogram<u64>>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|thread| {
                let file = &file;
                scope.spawn(move || {
                    let mut times = histogram();
                    let mut buffer = [0u8; SIZE as usize];
                    // A step prime to the number of slots visits each once (the golden ratio's
                    // share of it, made odd, then prime by search).
                    let step = coprime(per_thread);
                    let mut at = 0;
                    for _ in 0..per_thread {
                        if started.elapsed() >= limit {
                            break;
                        }
                        at = (at + step) % per_thread;
                        let t = Instant::now();
                        file.read_exact_at(&mut buffer, (thread * per_thread + at) * SIZE)?;
                        times.saturating_record(t.elapsed().as_nanos() as u64);
                    }
                    Ok(times)
                })
            })
            .collect();
        workers
            .into_iter()
            .map(|w| {
                w.join().unwrap_or_else(|_| Err(std::io::Error::other("a thread ended abruptly")))
            })
            .collect()
    });
    let seconds = started.elapsed().as_secs_f64();
    let mut times = histogram();
    for part in parts {
        let part = part.map_err(BenchError::file("read", path))?;
        times.add(&part).map_err(|e| BenchError::Worker(e.to_string()))?;
    }
    Ok(Random {
        per_s: times.len() as f64 / seconds,
        p50_us: times.value_at_quantile(0.5) as f64 / 1000.0,
    })
}

fn histogram() -> Histogram<u64> {
    // 100 ns to 100 s with two significant digits.
    Histogram::new_with_bounds(100, 100_000_000_000, 2).expect("constant bounds are valid")
}

/// A step of about 0.618 n that is prime to n.
fn coprime(n: u64) -> u64 {
    let gcd = |mut a: u64, mut b: u64| {
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    let first = (n as f64 * 0.618) as u64 | 1;
    (first..).find(|s| gcd(*s, n) == 1).unwrap_or(1)
}

/// Drops a file's pages, and everything else of the kernel's caches if we may.
fn drop_pages(file: &File, path: &Path, plan: &Plan) -> Result<(), BenchError> {
    // Dirty pages stay; there are none after a sync.
    file.sync_all().map_err(BenchError::file("sync", path))?;
    let _ = posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    drop_caches(plan);
    Ok(())
}

/// Page cache, dentries and inodes of the whole machine; `false`: not allowed.
fn drop_caches(plan: &Plan) -> bool {
    plan.machine_caches && std::fs::write("/proc/sys/vm/drop_caches", "3").is_ok()
}

/// The rows for people.
pub fn table(outcome: &Outcome) -> String {
    let runs = |v: &[f64]| v.iter().map(|x| number(*x)).collect::<Vec<_>>().join(" ");
    let cells: Vec<Vec<String>> = outcome
        .rows
        .iter()
        .map(|r| {
            let dash = || "-".to_owned();
            vec![
                r.job.clone(),
                r.unit.to_owned(),
                number(r.ours),
                r.plain.map_or_else(dash, number),
                r.ratio.map_or_else(dash, |x| format!("{x:.2}")),
                runs(&r.ours_runs),
                runs(&r.plain_runs),
                r.bar.as_ref().map_or(String::new(), ToString::to_string),
            ]
        })
        .collect();
    let header = [
        "through the mount",
        "",
        "ours",
        "plain",
        "ours/plain",
        "runs: ours",
        "runs: plain",
        "bar",
    ];
    let mut text = columns(&header, &cells);
    for note in &outcome.notes {
        text += &format!("\nnote: {note}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_offsets_visit_every_slot_once() {
        for n in [1, 2, 7, 32, 8192, 262_144 / 32] {
            let step = coprime(n);
            let mut seen = vec![false; n as usize];
            let mut at = 0;
            for _ in 0..n {
                at = (at + step) % n;
                assert!(!std::mem::replace(&mut seen[at as usize], true), "{n}");
            }
        }
    }

    #[test]
    fn every_job_runs_on_a_plain_directory_and_leaves_nothing() {
        let dir = std::env::temp_dir().join(format!("ebb-bench-test-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("made");
        let plan = Plan {
            dir: dir.clone(),
            plain: None,
            runs: 1,
            file_bytes: 16 << 20,
            files: 120,
            seconds: 1,
            machine_caches: false,
        };
        let outcome = run(&plan, || Ok(()), |_| {}).expect("runs");
        assert_eq!(outcome.rows.len(), Job::ALL.len());
        assert!(outcome.rows.iter().all(|r| r.ours_runs.len() == 1));
        assert_eq!(std::fs::read_dir(&dir).expect("there").count(), 0);
        std::fs::remove_dir(&dir).expect("empty");
    }
}
