//! The same rows of two clusters, in turn: what a setting costs, or what another version gains.
//!
//! A run is one of each cluster, and which is first changes from run to run. A ratio is the median of those of the runs.

use super::outcome::JUDGED_DEPTH;
use super::{Operation, Outcome, Plan, run};
use crate::BenchError;
use crate::report::{Bar, Limit, columns, median, number};
use ebb_client::FileSystem;
use ebb_dataplane_protocol::auth::ClusterKey;
use serde::Serialize;

/// One of two clusters.
#[derive(Clone, Debug)]
pub struct Side {
    /// Its files.
    pub fs: FileSystem,
    /// Its key.
    pub key: ClusterKey,
    /// Copies that it keeps of what is not in S3.
    pub replicas: u32,
}

/// A row of both.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Pair {
    /// As in the rows of one cluster.
    pub operation: &'static str,
    /// Bytes of a request.
    pub size_bytes: u64,
    /// Requests in flight.
    pub depth: u32,
    /// Requests per second of this cluster, median.
    pub iops: f64,
    /// And of the other.
    pub other_iops: f64,
    /// Median latency of this cluster, µs, and of the other.
    pub p50_us: [f64; 2],
    /// Median over the runs of this / other.
    pub ratio: f64,
    /// Of each run.
    pub ratio_runs: Vec<f64>,
    /// What it should be: two replicas against one.
    pub bar: Option<Bar>,
}

/// What came out.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Beside {
    /// Runs.
    pub runs: u32,
    /// Copies that this cluster keeps, and the other.
    pub replicas: [u32; 2],
    /// All rows.
    pub pairs: Vec<Pair>,
    /// What a reader should know.
    pub notes: Vec<String>,
}

/// Runs the plan on both, in turn.
pub async fn beside(
    this: &Side,
    other: &Side,
    plan: &Plan,
    say: impl Fn(&str),
) -> Result<Beside, BenchError> {
    let mut outcomes: [Vec<Outcome>; 2] = Default::default();
    for n in 0..plan.runs {
        let order = if n % 2 == 0 { [0, 1] } else { [1, 0] };
        for side in order {
            let (name, cluster) = [("this cluster", this), ("the other", other)][side];
            say(&format!("run {} of {}: {name}", n + 1, plan.runs));
            let one = Plan { runs: 1, baseline: None, key: cluster.key.clone(), ..plan.clone() };
            outcomes[side].push(run(&cluster.fs, &one, &say).await?);
        }
    }
    Ok(paired(&outcomes, [this.replicas, other.replicas]))
}

fn paired(outcomes: &[Vec<Outcome>; 2], replicas: [u32; 2]) -> Beside {
    let mut all = Beside { runs: outcomes[0].len() as u32, replicas, ..Beside::default() };
    for note in outcomes.iter().flatten().flat_map(|o| &o.notes) {
        if !all.notes.contains(note) {
            all.notes.push(note.clone());
        }
    }
    let rows = outcomes[0].first().map_or(&[][..], |o| &o.rows);
    for (i, row) in rows.iter().enumerate() {
        let of = |side: usize| outcomes[side].iter().filter_map(move |o| o.rows.get(i));
        let medians = |side: usize, what: fn(&super::Row) -> f64| {
            median(&of(side).map(what).collect::<Vec<_>>())
        };
        let ratio_runs: Vec<f64> = of(0)
            .zip(of(1))
            .filter(|(_, other)| other.iops > 0.0)
            .map(|(this, other)| this.iops / other.iops)
            .collect();
        let ratio = median(&ratio_runs);
        // Two copies on one machine are twice the work.
        let judged = replicas == [2, 1]
            && row.operation == Operation::Write.name()
            && row.depth >= JUDGED_DEPTH
            && !ratio_runs.is_empty();
        all.pairs.push(Pair {
            operation: row.operation,
            size_bytes: row.size_bytes,
            depth: row.depth,
            iops: medians(0, |r| r.iops),
            other_iops: medians(1, |r| r.iops),
            p50_us: [medians(0, |r| r.p50_us), medians(1, |r| r.p50_us)],
            ratio,
            ratio_runs,
            bar: judged.then(|| Limit::at_least(0.45).judge(ratio)),
        });
    }
    all
}

/// The outcome for people.
pub fn beside_table(outcome: &Beside) -> String {
    let header =
        ["", "bytes", "depth", "IOPS", "other's", "p50 µs", "other's", "ratio", "of the runs", ""];
    let row = |p: &Pair| {
        let ratios: Vec<String> = p.ratio_runs.iter().map(|v| format!("{v:.2}")).collect();
        vec![
            p.operation.to_owned(),
            p.size_bytes.to_string(),
            p.depth.to_string(),
            number(p.iops),
            number(p.other_iops),
            number(p.p50_us[0]),
            number(p.p50_us[1]),
            format!("{:.2}", p.ratio),
            ratios.join(" "),
            p.bar.as_ref().map_or(String::new(), ToString::to_string),
        ]
    };
    let [this, other] = outcome.replicas;
    let mut text = format!("copies of what is not in S3: {this}; the other cluster: {other}\n\n");
    text += &columns(&header, &outcome.pairs.iter().map(row).collect::<Vec<_>>());
    for note in &outcome.notes {
        text += &format!("\nnote: {note}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::Row;
    use super::*;

    fn outcome(iops: &[f64]) -> Outcome {
        let row = |(i, iops): (usize, &f64)| Row {
            operation: Operation::Write.name(),
            size_bytes: 4096 << i,
            depth: [16, 1][i],
            iops: *iops,
            ..Row::default()
        };
        Outcome {
            rows: iops.iter().enumerate().map(row).collect(),
            notes: vec!["told once".into()],
            ..Outcome::default()
        }
    }

    #[test]
    fn a_ratio_is_of_figures_of_one_run_and_two_copies_are_judged() {
        let this = vec![outcome(&[50.0, 9.0]), outcome(&[10.0, 9.0]), outcome(&[44.0, 9.0])];
        let other = vec![outcome(&[100.0, 3.0]), outcome(&[20.0, 3.0]), outcome(&[110.0, 3.0])];
        let both = [this, other];
        let told = paired(&both, [2, 1]);
        assert_eq!((told.runs, told.notes.len()), (3, 1));
        let [judged, one_at_a_time] = &told.pairs[..] else { panic!("{told:?}") };
        assert_eq!((judged.ratio, judged.iops, judged.other_iops), (0.5, 44.0, 100.0));
        assert!(judged.bar.as_ref().is_some_and(|b| b.met && b.limit == 0.45));
        assert_eq!((one_at_a_time.ratio, &one_at_a_time.bar), (3.0, &None));
        assert!(paired(&both, [2, 2]).pairs[0].bar.is_none(), "another comparison");
        let worse = [both[0].clone(), vec![outcome(&[200.0, 3.0]); 3]];
        assert!(paired(&worse, [2, 1]).pairs[0].bar.as_ref().is_some_and(|b| !b.met));
        let text = beside_table(&told);
        assert!(text.contains("0.50") && text.contains("bar ≥ 0.45: met"), "{text}");
    }
}
