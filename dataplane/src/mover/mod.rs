//! The S3 mover: executes the cores' jobs on tokio threads, results back by mailbox.
//!
//! Bounded: the queue here, the requests in flight in the bucket's client, and what a core has out at
//! once (its fill buffers and uploads). It decides nothing: what S3 said becomes an outcome and goes
//! back (I3: a lost reply is `Ambiguous`, never success).

mod work;

use crate::core::{FetchError, Job, JobDone, Work};
use crate::reactor_glue::Mail;
use ebb_dataplane_protocol::control::StoreOutcome;
use ebb_ring::{Buf, MailSender, SendRefused};
use ebb_s3::Bucket;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc, watch};

/// Jobs that wait to be started.
const QUEUE_MAX: usize = 1024;
/// Jobs in progress.
const JOBS_MAX: usize = 256;
/// Pause while a core's mailbox is full.
const FULL_PAUSE: Duration = Duration::from_millis(2);

/// The mailboxes of the cores, known once they run.
pub(crate) type Mailboxes = Arc<OnceLock<Vec<MailSender<Mail>>>>;

/// A core's way to the mover.
#[derive(Debug)]
pub(crate) struct JobSender {
    core: usize,
    queue: mpsc::Sender<(usize, Job<Buf>)>,
}

impl JobSender {
    /// Takes a job, or gives it back when the queue is full.
    pub(crate) fn try_send(&self, job: Job<Buf>) -> Option<Job<Buf>> {
        self.queue.try_send((self.core, job)).err().map(|e| e.into_inner().1)
    }
}

/// Jobs on their way to the mover.
pub(crate) type JobQueue = mpsc::Receiver<(usize, Job<Buf>)>;

/// The queue, with one sender per core.
pub(crate) fn queue(cores: usize) -> (Vec<JobSender>, JobQueue) {
    let (tx, rx) = mpsc::channel(QUEUE_MAX);
    let senders = (0..cores).map(|core| JobSender { core, queue: tx.clone() }).collect();
    (senders, rx)
}

/// Executes jobs until every core is gone.
pub(crate) async fn run(
    mut jobs: JobQueue,
    bucket: watch::Receiver<Option<Bucket>>,
    mailboxes: Mailboxes,
) {
    let slots = Arc::new(Semaphore::new(JOBS_MAX));
    while let Some((core, job)) = jobs.recv().await {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let bucket = bucket.borrow().clone();
        let mailboxes = Arc::clone(&mailboxes);
        tokio::spawn(async move {
            let done = execute(bucket, job).await;
            drop(slot);
            deliver(&mailboxes, core, done).await;
        });
    }
}

async fn execute(bucket: Option<Bucket>, job: Job<Buf>) -> JobDone<Buf> {
    let Job { token, work } = job;
    match (bucket, work) {
        (Some(bucket), Work::Fetch { key, etag, range, mut buf, at }) => {
            let result = work::fetch(&bucket, &key, &etag, range, &mut buf, at).await;
            JobDone::Fetched { token, buf, result }
        }
        (None, Work::Fetch { buf, .. }) => {
            JobDone::Fetched { token, buf, result: Err(FetchError::Unavailable) }
        }
        (Some(bucket), work) => {
            JobDone::Stored { token, outcome: work::store(&bucket, work).await }
        }
        (None, _) => {
            let outcome = StoreOutcome::Failed("the bucket is not known yet".into());
            JobDone::Stored { token, outcome }
        }
    }
}

async fn deliver(mailboxes: &Mailboxes, core: usize, done: JobDone<Buf>) {
    let Some(mailbox) = mailboxes.get().and_then(|m| m.get(core)) else { return };
    let mut mail = Mail::Job(done);
    loop {
        match mailbox.try_send(mail) {
            Ok(()) | Err(SendRefused::Gone(_)) => return,
            Err(SendRefused::Full(back)) => mail = back,
        }
        tokio::time::sleep(FULL_PAUSE).await;
    }
}
