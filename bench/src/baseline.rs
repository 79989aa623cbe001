//! What the machine itself can do: `fio` on the cluster's file system and `iperf3` on loopback, run
//! between our own measurements. A tool that is not installed is named with its package.

use crate::BenchError;
use serde_json::Value;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::process::Command;

/// One measurement of a tool.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sample {
    /// Requests per second; 0 where there are none.
    pub iops: f64,
    /// 10^6 bytes per second.
    pub mb_per_s: f64,
    /// Median latency, µs; 0 where there is none, as below.
    pub p50_us: f64,
    /// 99th percentile, µs.
    pub p99_us: f64,
    /// 99.9th percentile, µs.
    pub p999_us: f64,
}

/// The tools, and the file `fio` works on, which goes with this value.
#[derive(Debug)]
pub struct Baseline {
    file: PathBuf,
    file_bytes: u64,
    fio: bool,
    iperf3: bool,
}

impl Drop for Baseline {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.file);
    }
}

async fn installed(program: &str) -> bool {
    let status =
        Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.await.is_ok_and(|s| s.success())
}

impl Baseline {
    /// Looks for the tools and, for `fio`, writes a file of `file_bytes` into `dir`. The second
    /// value says what is missing.
    pub async fn prepare(dir: &Path, file_bytes: u64) -> Result<(Self, Vec<String>), BenchError> {
        let mut missing = Vec::new();
        for program in ["fio", "iperf3"] {
            if !installed(program).await {
                missing.push(format!(
                    "{program} is not installed, so there is nothing to compare with: apt-get install {program}"
                ));
            }
        }
        let has = |program: &str| !missing.iter().any(|m| m.starts_with(program));
        let file = dir.join(format!(".ebb-bench-fio-{}", std::process::id()));
        let this = Self { file, file_bytes, fio: has("fio"), iperf3: has("iperf3") };
        if this.fio {
            this.write_file().map_err(BenchError::file("write", &this.file))?;
        }
        Ok((this, missing))
    }

    /// Written whole before anything is measured: unwritten extents would be read as zeros
    /// without touching the device.
    fn write_file(&self) -> std::io::Result<()> {
        let block = crate::chunk::pattern();
        let mut file = std::fs::File::create(&self.file)?;
        let mut left = self.file_bytes;
        while left > 0 {
            let n = left.min(block.len() as u64);
            file.write_all(&block[..n as usize])?;
            left -= n;
        }
        file.sync_all()
    }

    /// Whether `fio` is there.
    pub fn has_fio(&self) -> bool {
        self.fio
    }
    /// Whether `iperf3` is there.
    pub fn has_iperf3(&self) -> bool {
        self.iperf3
    }

    /// `fio` with io_uring and O_DIRECT at random offsets: reads, or writes that are durable each
    /// (O_DSYNC), as ours are.
    pub async fn fio(
        &self,
        read: bool,
        size: u64,
        depth: u32,
        seconds: u64,
    ) -> Result<Sample, BenchError> {
        let mut command = Command::new("fio");
        command
            .arg("--name=ebb")
            .arg(format!("--filename={}", self.file.display()))
            .arg(if read { "--rw=randread" } else { "--rw=randwrite" })
            .arg(format!("--bs={size}"))
            .arg(format!("--iodepth={depth}"))
            .arg(format!("--size={}", self.file_bytes))
            .arg(format!("--runtime={seconds}"))
            .args(["--time_based", "--ioengine=io_uring", "--direct=1", "--numjobs=1"])
            .args(["--randrepeat=0", "--norandommap", "--output-format=json"]);
        if !read {
            command.arg("--sync=dsync");
        }
        let report = json("fio", command).await?;
        let side = &report["jobs"][0][if read { "read" } else { "write" }];
        let get = |v: &Value, what: &str| -> Result<f64, BenchError> {
            v.as_f64().ok_or_else(|| BenchError::Program {
                program: "fio",
                why: format!("its report has no {what}"),
            })
        };
        let us = |q: &str| -> Result<f64, BenchError> {
            Ok(get(&side["clat_ns"]["percentile"][q], "percentiles")? / 1000.0)
        };
        Ok(Sample {
            iops: get(&side["iops"], "iops")?,
            mb_per_s: get(&side["bw_bytes"], "bw_bytes")? / 1e6,
            p50_us: us("50.000000")?,
            p99_us: us("99.000000")?,
            p999_us: us("99.900000")?,
        })
    }

    /// `iperf3`, one stream over loopback, client and server on this machine.
    pub async fn iperf3(&self, seconds: u64) -> Result<Sample, BenchError> {
        let failed = |why: String| BenchError::Program { program: "iperf3", why };
        let port = std::net::TcpListener::bind(("127.0.0.1", 0))
            .and_then(|l| l.local_addr())
            .map_err(|e| failed(format!("no free port: {e}")))?
            .port()
            .to_string();
        let mut server = Command::new("iperf3")
            .args(["--server", "--one-off", "--bind", "127.0.0.1", "--port", &port])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| failed(e.to_string()))?;
        // The server says nowhere that it listens; a refused client is asked again.
        let mut last = None;
        for _ in 0..50 {
            let mut client = Command::new("iperf3");
            client
                .args(["--client", "127.0.0.1", "--port", &port, "--json", "--time"])
                .arg(seconds.to_string());
            match json("iperf3", client).await {
                Ok(report) => {
                    let _ = server.kill().await;
                    let bits = report["end"]["sum_received"]["bits_per_second"]
                        .as_f64()
                        .ok_or_else(|| failed("its report has no sum_received".into()))?;
                    return Ok(Sample { mb_per_s: bits / 8e6, ..Sample::default() });
                }
                Err(e) => last = Some(e),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let _ = server.kill().await;
        Err(last.unwrap_or_else(|| failed("no answer".into())))
    }
}

async fn json(program: &'static str, mut command: Command) -> Result<Value, BenchError> {
    let failed = |why: String| BenchError::Program { program, why };
    let output = command
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|e| failed(e.to_string()))?;
    // Warnings may stand before the document.
    let text = String::from_utf8_lossy(&output.stdout);
    let document = text.find('{').map_or("", |at| &text[at..]);
    match serde_json::from_str::<Value>(document) {
        // iperf3 tells of a failure in its report, and may exit with 0 all the same.
        Ok(v) => match v["error"].as_str() {
            Some(why) => Err(failed(why.to_owned())),
            None if output.status.success() => Ok(v),
            None => Err(failed(output.status.to_string())),
        },
        Err(e) => {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(failed(format!("{}: {e}; {}", output.status, said.trim())))
        }
    }
}
