//! A tar archive of many small files, the same bytes at every run: what the untar job unpacks.
//! POSIX ustar (IEEE Std 1003.1-2017, pax, "ustar Interchange Format").

use std::io::{self, Write};

const BLOCK: usize = 512;
/// Files of a directory.
const PER_DIRECTORY: u32 = 100;

/// Sizes from 200 bytes to about 12 KB, like sources.
fn size_of(file: u32) -> usize {
    200 + (file.wrapping_mul(2_654_435_761) >> 8) as usize % 12_000
}

/// Writes an archive of `files` files under `tree/` and says how many bytes they hold.
pub(crate) fn write(out: &mut impl Write, files: u32, uid: u32, gid: u32) -> io::Result<u64> {
    let mut total = 0;
    header(out, "tree/", 0, b'5', uid, gid)?;
    for file in 0..files {
        if file % PER_DIRECTORY == 0 {
            let name = format!("tree/dir{:04}/", file / PER_DIRECTORY);
            header(out, &name, 0, b'5', uid, gid)?;
        }
        let size = size_of(file);
        let name = format!("tree/dir{:04}/file{file:06}.txt", file / PER_DIRECTORY);
        header(out, &name, size, b'0', uid, gid)?;
        let mut body = Vec::with_capacity(size + BLOCK);
        let mut line = 0u32;
        while body.len() < size {
            let word = file.wrapping_mul(31).wrapping_add(line).wrapping_mul(2_654_435_761);
            writeln!(body, "line {line} of file {file}: {word:08x}")?;
            line += 1;
        }
        body.truncate(size);
        body.resize(size.next_multiple_of(BLOCK), 0);
        out.write_all(&body)?;
        total += size as u64;
    }
    out.write_all(&[0; 2 * BLOCK])?;
    Ok(total)
}

fn header(
    out: &mut impl Write,
    name: &str,
    size: usize,
    kind: u8,
    uid: u32,
    gid: u32,
) -> io::Result<()> {
    let mut h = [0u8; BLOCK];
    let mut put = |at: usize, text: &str| h[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, name);
    put(100, if kind == b'5' { "0000755" } else { "0000644" });
    put(108, &format!("{:07o}", uid & 0o7_777_777));
    put(116, &format!("{:07o}", gid & 0o7_777_777));
    put(124, &format!("{size:011o}"));
    // 2020-01-01, so that the archive never changes.
    put(136, &format!("{:011o}", 1_577_836_800u64));
    put(148, "        ");
    put(257, "ustar\x0000");
    h[156] = kind;
    let sum: u32 = h.iter().map(|b| u32::from(*b)).sum();
    h[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    out.write_all(&h)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tar_unpacks_what_was_packed_and_it_is_the_same_every_time() {
        let (mut a, mut b) = (Vec::new(), Vec::new());
        let total = write(&mut a, 250, 0, 0).expect("memory");
        write(&mut b, 250, 0, 0).expect("memory");
        assert_eq!(a, b);
        assert_eq!(total, (0..250).map(|f| size_of(f) as u64).sum::<u64>());
        // GNU tar is the judge, where there is one.
        let Ok(mut tar) = std::process::Command::new("tar")
            .args(["-t", "-v", "-f", "-"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
        else {
            return;
        };
        let mut stdin = tar.stdin.take().expect("piped");
        let writer = std::thread::spawn(move || stdin.write_all(&a));
        let output = tar.wait_with_output().expect("runs");
        writer.join().expect("joins").expect("written");
        assert!(output.status.success());
        // The root, three directories, the files.
        assert_eq!(String::from_utf8_lossy(&output.stdout).lines().count(), 1 + 3 + 250);
    }
}
